"""How long a save holds the training up: written at once, and written in the background, in turn, in one run.

    python benchmarks/background_save.py [--million 100] [--rounds 3]

Saves an engine of so many million parameters (12 bytes each of optimizer state) and prints for both ways the
seconds until `save` returns and until the checkpoint is published. Ends with a line of JSON: ratio = pause in
the background / pause at once.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.distributed.process_group import join, leave, world_from_environment
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.train_state import TrainState


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/background_save.py --million 50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--million", type=int, default=100, help="parameters in millions (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    join(world_from_environment())
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(args.million)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )[0]
    engine.backward(engine(torch.randn(1, 1000, dtype=torch.bfloat16, device=engine.device)).float().sum())
    engine.step()  # AdamW has its moments now
    pauses: dict[str, list[float]] = {"at once": [], "background": []}
    for number in range(2 * args.rounds):
        how = list(pauses)[number % 2]
        engine.checkpoint_engine = NotingCheckpointEngine(engine._config, background=how == "background")
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpointer(Path(folder), keep=1)
            began = time.perf_counter()
            checkpoints.save(engine, TrainState(step=1), {})
            pauses[how].append(time.perf_counter() - began)
            checkpoints.finish()
            print(
                f"{how:10}  training stood for {pauses[how][-1]:6.2f} s, published after "
                f"{time.perf_counter() - began:6.2f} s",
                flush=True,
            )
    dist.barrier()
    leave()
    median = {how: statistics.median(values) for how, values in pauses.items()}
    print(
        json.dumps(
            {
                "ratio": round(median["background"] / median["at once"], 4),
                **{f"{how.replace(' ', '_')}_s": round(value, 3) for how, value in median.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
