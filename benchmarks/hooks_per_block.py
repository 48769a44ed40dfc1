"""What DeepSpeed's hooks cost the host for each block: ZeRO-3 with hooks on blocks ("leaf_module": "auto"), with hooks
on every module, and ZeRO-1, which has none, in turn in one run.

    deepspeed --num_gpus 1 benchmarks/hooks_per_block.py [--depths 8 32] [--rounds 6]

Blocks of a width of 64, so that calls are nearly all there is. Each way has a model of each depth; the difference of
their steps over the difference of their depths is a step's cost of one block, without heads and batch. Prints CPU
and wall-clock milliseconds of each, the load of the machine, and ratios to ZeRO-1; ends with a line of JSON.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from frozen_backbone import first_batch
from speed_steps import finish
from timing import in_turn, train_step
from workload import ROOT, Workload, ds_config_of, vit

from internseg_ds import SegmentorEngine
from internseg_ds.cli import command_line
from internseg_ds.data.loading import Batch

WIDTH, HEADS = 64, 2
WARMUP = 3
"""Steps: ZeRO-3 looks on in the first and plans in the second."""


def ds_configs() -> dict[str, dict[str, Any]]:
    """By way."""
    zero1, on_blocks, on_modules = (
        ds_config_of(str(ROOT / f"ds_configs/{name}.json"), "bfloat16")
        for name in ("zero1_bf16", "zero3_bf16", "zero3_bf16")
    )
    on_modules["zero_optimization"]["leaf_module"] = {"classes": []}
    return {"zero1": zero1, "zero3_blocks": on_blocks, "zero3_modules": on_modules}


def engine_of(ds_config: dict[str, Any], depth: int, args: Any, folder: Path) -> SegmentorEngine:
    options = vit(WIDTH, depth, HEADS) | {"engine.recomputation": args.recomputation}
    workload = Workload(options=options, micro_batch=args.images, image_px=args.pixels)
    return SegmentorEngine(workload.experiment, ds_config, work_dir=folder, validate=False, saves=False)


def seconds_per_step(engine: SegmentorEngine, batch: Batch, steps: int) -> tuple[float, float]:
    """Of CPU and of the clock."""
    finish(engine)
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        train_step(engine, batch)
    finish(engine)
    return (time.process_time() - cpu_began) / steps, (time.perf_counter() - began) / steps


def report(times: dict[tuple[str, int], list[tuple[float, float]]], args: Any, processes: int) -> None:
    shallow, deep = args.depths
    found: dict[str, dict[str, float]] = {}
    for way in ds_configs():
        row: dict[str, float] = {}
        for unit, index in (("cpu", 0), ("wall", 1)):
            steps = {depth: [1e3 * taken[index] for taken in times[way, depth]] for depth in (shallow, deep)}
            # of each round by itself: what disturbs a round disturbs both depths
            of_rounds = [
                (more - less) / (deep - shallow)
                for less, more in zip(steps[shallow], steps[deep], strict=True)
            ]
            row |= {f"{unit}_ms_per_block": statistics.median(of_rounds)}
            row |= {f"{unit}_ms_per_block_least": min(of_rounds), f"{unit}_ms_per_block_most": max(of_rounds)}
            row |= {f"{unit}_ms_per_step": statistics.median(steps[deep])}
        found[way] = row
    for way, row in found.items():
        for unit in ("cpu", "wall"):
            row[f"{unit}_ratio"] = row[f"{unit}_ms_per_block"] / found["zero1"][f"{unit}_ms_per_block"]
        print(
            f"{way:14} per block {row['cpu_ms_per_block']:7.3f} ms of CPU ({row['cpu_ms_per_block_least']:.3f} "
            f"to {row['cpu_ms_per_block_most']:.3f}), {row['wall_ms_per_block']:7.3f} of the clock; over "
            f"ZeRO-1 {row['cpu_ratio']:.2f} and {row['wall_ratio']:.2f}; a step of {deep} blocks "
            f"{row['cpu_ms_per_step']:.0f} ms of CPU, {row['wall_ms_per_step']:.0f} of the clock"
        )
    settings = {"depths": args.depths, "images": args.images, "recomputation": args.recomputation}
    rounded = {way: {key: round(value, 4) for key, value in row.items()} for way, row in found.items()}
    print(json.dumps({**settings, "processes": processes, "load": os.getloadavg()[0], "ways": rounded}))


def main() -> None:
    parser = command_line.parser(
        __doc__.splitlines()[0], "deepspeed --num_gpus 1 benchmarks/hooks_per_block.py"
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs=2,
        default=(8, 32),
        help="blocks of the two models, 4 or more and not alike",
    )
    parser.add_argument("--images", type=int, default=2, help="per process")
    parser.add_argument("--pixels", type=int, default=112, help="side of the images")
    parser.add_argument("--recomputation", default="none", help="engine.recomputation")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="per round, way and depth")
    args = parser.parse_args()
    if min(args.depths) < 4 or len(set(args.depths)) < 2:  # the heads take the maps of four blocks
        parser.error(f"--depths {args.depths[0]} {args.depths[1]} must be two numbers, each 4 or more")
    # one for all ranks
    folder = Path(tempfile.gettempdir(), f"hooks_per_block_{os.environ.get('MASTER_PORT', 'alone')}")
    engines: dict[tuple[str, int], SegmentorEngine] = {}
    for way, ds_config in ds_configs().items():
        for depth in args.depths:
            engines[way, depth] = engine_of(ds_config, depth, args, folder / f"{way}_{depth}")
    owner, *others = engines.values()
    batch = first_batch(owner)
    for engine in engines.values():
        engine.deepspeed.train()
        seconds_per_step(engine, batch, WARMUP)
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in engines}
    for key in in_turn(list(engines), args.rounds):
        times[key].append(seconds_per_step(engines[key], batch, args.steps))
    if owner.world.is_main:
        report(times, args, owner.world.size)
    for engine in (*reversed(others), owner):
        engine.close()


if __name__ == "__main__":
    command_line.run(main)
