"""What our training loop costs over a bare DeepSpeed loop: the same engine, data workers and batches, in
turn, in one run.

    deepspeed --num_gpus 2 benchmarks/engine_overhead.py [--rounds 6] [--config CONFIG] [--deepspeed_config JSON]

Each round trains 2 x STEPS steps with `SegmentorEngine.train` and as many with the bare loop, and times the
second half of each (the first fills the data workers' queues). Prints seconds per step of every round, and
ends with a line of JSON: ratio = median of ours / median of bare.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from timing import train_on

from internseg_ds import SegmentorEngine
from internseg_ds.cli import command_line
from internseg_ds.data.loading import training_batches
from internseg_ds.data.sampler import GlobalBatchSampler

STEPS = 15


def ours(engine: SegmentorEngine, start: int) -> float:
    """Seconds per step of the real loop, as it logs them. start: the position in the stream of images."""
    engine.state.images = start
    train_on(engine, 2 * STEPS, log_every=STEPS)
    if not engine.world.is_main:
        return 0.0
    records = [json.loads(line) for line in (engine.work_dir / "metrics.jsonl").read_text().splitlines()]
    return engine.plan.ds.global_batch / records[-1]["images_per_s"]


def bare(engine: SegmentorEngine, start: int) -> float:
    """Seconds per step of the least that DeepSpeed needs: forward, backward, step. start: the position in the
    stream of images."""
    plan, world = engine.plan, engine.world
    sampler = GlobalBatchSampler(
        len(plan.train_set), plan.ds.micro_batch, rank=world.rank, world_size=world.size, start=start
    )
    batches = training_batches(
        plan.train_set, sampler, workers=plan.experiment.workers, seed=0, device=world.device
    )
    for _ in range(2):  # the first half warms up
        began = time.perf_counter()
        for _ in range(STEPS * plan.ds.accumulation):
            terms = engine.deepspeed(return_loss=True, **next(batches).inputs)
            loss = sum(value for name, value in terms.items() if "loss" in name)
            engine.deepspeed.backward(loss)
            engine.deepspeed.step()
        loss.item()  # waits for the device, as a log record does
        seconds = time.perf_counter() - began
    return seconds / STEPS


def main() -> None:
    parser = command_line.parser(
        __doc__.splitlines()[0], "deepspeed --num_gpus 2 benchmarks/engine_overhead.py"
    )
    parser.add_argument("--config", default="configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_bf16.json")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    # one for all ranks
    folder = Path(tempfile.gettempdir(), f"engine_overhead_{os.environ.get('MASTER_PORT', 'alone')}")
    # disks are not the subject
    with SegmentorEngine(
        args.config, args.deepspeed_config, work_dir=folder, validate=False, saves=False
    ) as engine:
        times: dict[str, list[float]] = {"ours": [], "bare": []}
        for round_ in range(args.rounds):
            start = engine.state.images
            for name, loop in (
                (("ours", ours), ("bare", bare)) if round_ % 2 == 0 else (("bare", bare), ("ours", ours))
            ):
                times[name].append(loop(engine, start))
            if engine.world.is_main:
                print(
                    f"round {round_}: ours {times['ours'][-1]:.4f} s/step, bare {times['bare'][-1]:.4f} "
                    "s/step",
                    flush=True,
                )
        if engine.world.is_main:
            medians = {name: statistics.median(values) for name, values in times.items()}
            print(
                json.dumps(
                    {
                        "ratio": round(medians["ours"] / medians["bare"], 4),
                        **{f"{name}_s": round(value, 4) for name, value in medians.items()},
                    }
                )
            )


if __name__ == "__main__":
    command_line.run(main)
