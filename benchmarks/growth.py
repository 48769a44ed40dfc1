"""How a training step's cost grows: one curve per command, of seconds per step and peak memory of
`SegmentorEngine.train`.

    python benchmarks/growth.py model            width and depth of the backbone, 1 M to 300 M parameters
    python benchmarks/growth.py image            side of the images
    python benchmarks/growth.py classes          150 (ADE20K), 171 (COCO-Stuff), 847 (ADE20K-Full)
    python benchmarks/growth.py world    processes: each with the same images (weak), or the same in all (strong)
    python benchmarks/growth.py groups           parameter groups, under ZeRO-1 and ZeRO-3

Each point is the tiny experiment with options changed, in processes of its own with one thread each; rounds
alternate. Appends its points to --out, from which docs/draw_growth.py draws, and ends with a line of JSON:
for each series the exponent k of seconds ~ size^k, of CPU seconds and of memory, fitted to all points (memory
without what the libraries take before the model is built), and of CPU seconds between the last two points.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from train_step import measure
from workload import Workload, ds_config_of, vit

ZERO = {stage: f"ds_configs/zero{stage}_bf16.json" for stage in (1, 3)}


@dataclass(frozen=True)
class Point:
    """One measurement of a series. x: what grows (parameters, pixels, tokens, classes, processes, groups)."""

    series: str
    x: float
    workload: Workload
    world: int = 1


def workload(options: dict[str, Any] | None = None, *, stage: int = 3, **fields: Any) -> Workload:
    norms = {f"model.{head}.norm_cfg.type": "BN" for head in ("decode_head", "auxiliary_head")}
    return Workload(options=norms | (options or {}), ds_config=ds_config_of(ZERO[stage], "float32"), **fields)


def model_points(steps: int) -> list[Point]:
    """InternViT of 128 x 4 to 1024 x 24 under the narrow UPerNet of the tiny experiment, two images of 112 x
    112."""
    sizes = [(128, 4, 4), (192, 8, 4), (384, 12, 6), (768, 12, 12), (1024, 24, 16)]
    points = []
    for width, depth, heads in sizes:
        made = workload(
            vit(width, depth, heads), micro_batch=2, steps=max(2, steps // (1 + width * depth // 4000))
        )
        points.append(Point("ZeRO-3, 1 process", parameters(made), made))
    return points


def parameters(made: Workload) -> int:
    from internseg_ds.distributed.construction import build_on_meta

    return sum(param.numel() for param in build_on_meta(made.experiment.model).parameters())


def image_points(steps: int) -> list[Point]:
    """Two images of 112 to 672 pixels a side; attention alone grows with the square of the number of
    tokens."""
    return [
        Point(
            "ZeRO-3, 1 process",
            side * side,
            workload(
                {"model.backbone.img_size": side},
                image_px=side,
                micro_batch=2,
                steps=max(2, steps * 112 // side),
            ),
        )
        for side in (112, 168, 224, 336, 448, 672)
    ]


def class_points(steps: int) -> list[Point]:
    return [
        Point("ZeRO-3, 1 process", classes, workload(classes=classes, micro_batch=4, steps=steps))
        for classes in (150, 171, 400, 847)
    ]


def world_points(steps: int) -> list[Point]:
    """Weak: 4 images in each process. Strong: 12 images in all, so that 1 to 4 processes divide them."""
    return [
        Point(
            f"{kind}, ZeRO-{stage}",
            world,
            workload(
                stage=stage, micro_batch=4 if kind == "weak" else 12 // world, steps=max(2, steps // world)
            ),
            world,
        )
        for kind in ("weak", "strong")
        for stage in (1, 3)
        for world in (1, 2, 3, 4)
        if world != 3 or kind == "weak"
    ]


def group_points(steps: int) -> list[Point]:
    """A narrow backbone of 48 blocks, as many tensors as the 6 B recipe has, so that the groups can be
    seen."""
    return [
        Point(
            f"ZeRO-{stage}",
            groups,
            workload(vit(64, 48, 4), stage=stage, micro_batch=2, groups=groups, steps=steps),
        )
        for stage in (1, 3)
        for groups in (1, 10, 50, 98)
    ]


CURVES = {
    "model": (model_points, "parameters"),
    "image": (image_points, "pixels per image"),
    "classes": (class_points, "classes"),
    "world": (world_points, "processes"),
    "groups": (group_points, "parameter groups"),
}


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The k of y ~ x^k, by least squares on logarithms."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curve", choices=CURVES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps",
        type=int,
        default=8,
        help="timed steps of the smallest point, 2 or more (default: %(default)s)",
    )
    parser.add_argument("--points", type=int, help="only the first so many of each series")
    parser.add_argument(
        "--under",
        default="",
        metavar="COMMAND",
        help="what to start each measurement with, such as 'numactl -N 0'",
    )
    parser.add_argument("--out", type=Path, help="JSON lines to append the points to")
    args = parser.parse_args()
    if args.steps < 2:  # a step's CPU seconds are those between two forward passes
        parser.error(f"--steps {args.steps} must be 2 or more")
    make, what = CURVES[args.curve]
    points = chosen(make(args.steps), args.points)
    runs: list[list[dict]] = [[] for _ in points]
    with tempfile.TemporaryDirectory(prefix="growth_") as folder:
        for round_ in range(args.rounds):
            for index, point in enumerate(points) if round_ % 2 == 0 else reversed(list(enumerate(points))):
                found = measure(
                    "ours", point.workload, point.world, Path(folder), under=args.under, threads=1
                )
                if "error" in found:
                    sys.exit(f"error: {point.series}, {what} {point.x:g}: {found['error']}")
                runs[index].append(found)
                print(
                    f"round {round_}: {point.series}, {what} {point.x:g}: {found['seconds']:.4f} s/step, "
                    f"{found['peak_bytes'] / 2**30:.3f} GiB",
                    flush=True,
                )
    rows = [
        {
            "curve": args.curve,
            "what": what,
            "series": point.series,
            "x": point.x,
            "world": point.world,
            "micro_batch": point.workload.micro_batch,
            "seconds": statistics.median(run["seconds"] for run in found),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in found),
            "peak_gib": statistics.median(run["peak_bytes"] for run in found) / 2**30,
            "own_gib": statistics.median(run["peak_bytes"] - run["start_bytes"] for run in found) / 2**30,
        }
        for point, found in zip(points, runs, strict=True)
    ]
    report(args.curve, what, rows)
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def chosen(points: list[Point], first: int | None) -> list[Point]:
    """The first so many of each series, or all."""
    series = dict.fromkeys(point.series for point in points)
    return (
        points
        if first is None
        else [
            point for name in series for point in [point for point in points if point.series == name][:first]
        ]
    )


def report(curve: str, what: str, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "series",
        what,
        "s/step",
        "CPU s/step of a process",
        "images/s",
        "peak GiB of a process",
        "of which not libraries",
        title=f"{curve}: {os.cpu_count()} cores" if curve == "world" else curve,
    )
    exponents = {}
    for name in dict.fromkeys(row["series"] for row in rows):
        series = [row for row in rows if row["series"] == name]
        for row in series:
            table.add_row(
                name,
                f"{row['x']:,.0f}",
                f"{row['seconds']:.4f}",
                f"{row['cpu_seconds']:.4f}",
                f"{row['world'] * row['micro_batch'] / row['seconds']:.3g}",
                f"{row['peak_gib']:.3f}",
                f"{row['own_gib']:.3f}",
            )
        xs, seconds, cpu, memory = (
            [row[key] for row in series] for key in ("x", "seconds", "cpu_seconds", "own_gib")
        )
        if len(series) > 1:
            exponents[name] = {
                "seconds": round(exponent(xs, seconds), 3),
                "cpu_seconds": round(exponent(xs, cpu), 3),
                "memory": round(exponent(xs, memory), 3),
                "cpu_seconds_last_two": round(exponent(xs[-2:], cpu[-2:]), 3),
            }
    Console(width=120).print(table)
    print(
        json.dumps(
            {
                "curve": curve,
                "exponents": exponents,
                "points": [
                    [
                        row["series"],
                        row["x"],
                        round(row["seconds"], 4),
                        round(row["cpu_seconds"], 4),
                        round(row["peak_gib"], 3),
                        round(row["own_gib"], 3),
                    ]
                    for row in rows
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
