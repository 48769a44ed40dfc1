"""What a step costs when the backbone is frozen: full tuning, its last blocks, adapters and the head alone, of the
same model on the same images, in turn, in one run.

    deepspeed --num_gpus 2 benchmarks/frozen_backbone.py [--deepspeed_config JSON] \\
        [--model tiny|small|100m|deep] [--rounds 5]

The engines are the real ones. Prints for each mode seconds per step (median of the rounds' means), bytes that
a micro-batch keeps for its backward pass, bytes of weights, gradients, optimizer and buffers of one process
between two steps, and bytes and calls of collectives in a step. Ends with a line of JSON: ratio = a mode's
seconds, and state_ratio its state, over those of full tuning. docs/performance.md says what came of it.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_steps import Kept, finish
from timing import in_turn, train_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workload import Workload, ds_config_of, vit

from internseg_ds import SegmentorEngine
from internseg_ds.cli import command_line
from internseg_ds.data.loading import Batch, training_batches
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.training import deepspeed_engine

MODES: dict[str, Any] = {
    "all": "all",
    "last quarter": "last_blocks",
    "LoRA": {"lora": {"rank": 8, "alpha": 16}},
    "head": "head",
    "head, one by one": "head",
}
"""Mode -> engine.tune, where "last_blocks" means a quarter of the model's. The last one is DeepSpeed's own way
with small frozen parameters under ZeRO-3: after each step, one by one."""
SIZES = {"tiny": (128, 4, 4), "small": (384, 12, 6), "100m": (768, 12, 12), "deep": (64, 48, 2)}
"""Width, depth and attention heads of InternViTs."""


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors of the collectives inside a `with` block, and their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            sizes = [
                sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor))
                for arg in args
            ]
            self.bytes, self.calls = self.bytes + max(sizes), self.calls + 1
        return func(*args, **(kwargs or {}))


def living_bytes() -> int:
    """Of all tensors of this process."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def engine_of(mode: str, args: Any, folder: Path) -> SegmentorEngine:
    """Of generated images in memory; every block that has to is recomputed."""
    tune = MODES[mode]
    width, depth, heads = SIZES[args.model]
    workload = Workload(
        options=vit(width, depth, heads) | {"engine.recomputation": "blocks"}, micro_batch=args.images
    )
    cfg = workload.experiment
    cfg.engine.tune = {"last_blocks": depth // 4} if tune == "last_blocks" else tune
    ds_config = ds_config_of(args.deepspeed_config, "bfloat16")
    ours = deepspeed_engine.gather_frozen_where_used
    if mode.endswith("one by one"):
        deepspeed_engine.gather_frozen_where_used = lambda _: None
    try:
        return SegmentorEngine(cfg, ds_config, work_dir=folder, validate=False, saves=False)
    finally:
        deepspeed_engine.gather_frozen_where_used = ours


def first_batch(engine: SegmentorEngine) -> Batch:
    """The first images of this rank."""
    dataset, ds, world = engine.plan.train_set, engine.plan.ds, engine.world
    sampler = GlobalBatchSampler(len(dataset), ds.micro_batch, rank=world.rank, world_size=world.size)
    return next(training_batches(dataset, sampler, workers=0, seed=0, device=world.device))


def measured(engine: SegmentorEngine, batch: Batch, before: int) -> dict[str, int]:
    """Of one engine after three steps. before: `living_bytes` without it."""
    engine.deepspeed.train()
    for _ in range(3):  # ZeRO-3 looks on in the first and records the second
        train_step(engine, batch)
    state = living_bytes() - before
    with Sent() as sent:
        train_step(engine, batch)
    with Kept() as kept:
        loss = engine.forward(batch)["loss"]
    found = {
        "state_bytes": state,
        "kept_bytes": kept.bytes(),
        "sent_bytes": sent.bytes,
        "calls": sent.calls,
    }
    engine.deepspeed.backward(loss)
    engine.deepspeed.step()
    return found


def timed(engines: dict[str, SegmentorEngine], batch: Batch, rounds: int, steps: int) -> dict[str, float]:
    """Seconds per step: the median of some rounds, in which the modes take turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for name in in_turn(list(engines), rounds):
        finish(engines[name])
        began = time.perf_counter()
        for _ in range(steps):
            train_step(engines[name], batch)
        finish(engines[name])
        times[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(values) for name, values in times.items()}


def report(found: dict[str, dict[str, float]], args: Any, processes: int) -> None:
    full = found["all"]
    for name, row in found.items():
        row["ratio"] = round(row["s"] / full["s"], 4)
        row["state_ratio"] = round(row["state_bytes"] / full["state_bytes"], 4)
        print(
            f"{name:18} {row['s']:8.4f} s/step  ratio {row['ratio']:.3f}  "
            f"state {row['state_bytes'] / 2**20:8.1f} MiB ({row['state_ratio']:.3f})  "
            f"kept {row['kept_bytes'] / 2**20:8.1f} MiB  "
            f"collectives {row['sent_bytes'] / 2**20:8.1f} MiB in {row['calls']:.0f} calls"
        )
    settings = {"model": args.model, "deepspeed_config": args.deepspeed_config, "processes": processes}
    print(json.dumps({**settings, "modes": found}))


def main() -> None:
    parser = command_line.parser(
        __doc__.splitlines()[0], "deepspeed --num_gpus 2 benchmarks/frozen_backbone.py"
    )
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_bf16.json")
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--images", type=int, default=2, help="per process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per round and mode")
    args = parser.parse_args()
    # one for all ranks
    folder = Path(tempfile.gettempdir(), f"frozen_backbone_{os.environ.get('MASTER_PORT', 'alone')}")
    engines: dict[str, SegmentorEngine] = {}
    found: dict[str, dict[str, float]] = {}
    batch: Batch | None = None
    for index, name in enumerate(MODES):
        before = living_bytes()
        engines[name] = engine_of(name, args, folder / str(index))
        batch = batch or first_batch(engines[name])
        found[name] = dict(measured(engines[name], batch, before))
    assert batch is not None
    for name, seconds in timed(engines, batch, args.rounds, args.steps).items():
        found[name]["s"] = round(seconds, 5)
    owner, *others = engines.values()
    if owner.world.is_main:
        report(found, args, owner.world.size)
    for engine in (*reversed(others), owner):
        engine.close()


if __name__ == "__main__":
    command_line.run(main)
