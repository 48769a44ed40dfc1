"""The update of a model with as many learning rates as InternViT-6B's recipe has (48 blocks, layer-wise
decay), of hardly any width: what is left is calls.

    python benchmarks/optimizer_step.py [--deepspeed_config JSON] [--rounds 10]

The same real engine with one parameter group for DeepSpeed (`optimization/ranged_adam.py`) and with one for
each setting, each in a process of its own. Counts operations, collectives and Python calls of DeepSpeed's
step and times it: in all, and from where it has read that the gradients are finite, before which a GPU still
has the backward pass to do. Ends with a line of JSON: ratio = seconds with one group over seconds with many,
ratio_after_wait.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

WAYS = ("one group", "a group for each setting")


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def measure(way: str, ds_config: str, rounds: int) -> dict[str, Any]:
    """In this process: the engine after a few steps, then one step counted and `rounds` timed."""
    import deepspeed.runtime.zero.stage3 as stage3
    import deepspeed.runtime.zero.stage_1_and_2 as stage_1_and_2
    import torch
    from workload import Workload, ds_config_of, vit

    from internseg_ds import SegmentorEngine
    from internseg_ds.data.loading import training_batches
    from internseg_ds.data.sampler import GlobalBatchSampler
    from internseg_ds.optimization import optimizers

    if way != WAYS[0]:
        optimizers.is_ranged = lambda *_: False
    cfg = Workload(options=vit(64, 48, 2)).experiment
    raw = ds_config_of(ds_config, "bfloat16")
    with (
        tempfile.TemporaryDirectory() as folder,
        SegmentorEngine(cfg, raw, work_dir=folder, validate=False) as engine,
    ):
        deepspeed, dataset, stage = (
            engine.deepspeed,
            engine.plan.train_set,
            stage3 if engine.plan.ds.stage == 3 else stage_1_and_2,
        )
        batches = training_batches(
            dataset,
            GlobalBatchSampler(len(dataset), engine.plan.ds.micro_batch),
            workers=0,
            seed=0,
            device=engine.world.device,
        )
        deepspeed.train()

        def until_step() -> None:
            deepspeed.backward(engine.forward(next(batches))["loss"])

        def finish() -> None:
            if engine.world.device.type == "cuda":
                torch.cuda.synchronize()

        for _ in range(3):
            until_step()
            deepspeed.step()
        until_step()
        with Operations() as operations:
            deepspeed.step()
        until_step()
        calls = 0

        def count(_: Any, event: str, __: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        deepspeed.step()
        sys.setprofile(None)
        seconds, after, waited = [], [], 0.0
        read = stage.is_invalid_grad_norm

        def reading(norm: Any) -> bool:
            nonlocal waited
            found, waited = read(norm), time.perf_counter()
            return found

        stage.is_invalid_grad_norm = reading
        for _ in range(rounds):
            until_step()
            finish()
            began = time.perf_counter()
            deepspeed.step()
            finish()
            ended = time.perf_counter()
            seconds.append(ended - began), after.append(ended - waited)
        return {
            "settings": len(deepspeed.lr_scheduler.base_lrs),
            "operations": sum(operations.found.values()),
            "all_reduces": operations.found["c10d::allreduce_"],
            "calls": calls,
            "seconds": statistics.median(seconds),
            "after_wait_s": statistics.median(after),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", default="ds_configs/zero3_bf16.json", metavar="JSON"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed updates (default: %(default)s)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.deepspeed_config, args.rounds)))
        return
    found = {}
    for way in WAYS:
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--way",
                way,
                "--deepspeed_config",
                args.deepspeed_config,
                "--rounds",
                str(args.rounds),
            ],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found[way] = json.loads(done.stdout.splitlines()[-1])
    table = Table(
        "",
        "settings",
        "operations",
        "all-reduces",
        "Python calls",
        "ms",
        "ms after the wait",
        title=f"one update, {Path(args.deepspeed_config).stem}",
    )
    for way, values in found.items():
        table.add_row(
            way,
            *(f"{values[key]:,}" for key in ("settings", "operations", "all_reduces", "calls")),
            f"{1000 * values['seconds']:.1f}",
            f"{1000 * values['after_wait_s']:.1f}",
        )
    Console(width=110).print(table)
    one, many = found.values()
    print(
        json.dumps(
            {
                "ratio": round(one["seconds"] / many["seconds"], 4),
                "ratio_after_wait": round(one["after_wait_s"] / many["after_wait_s"], 4),
                "ds_config": Path(args.deepspeed_config).stem,
                **found,
            }
        )
    )


if __name__ == "__main__":
    main()
