"""Whole trainings in each format of optimizer states, in float8 products and with bf16 heads, over seeds: is a
format's loss or score outside of what seeds alone do?

    python benchmarks/formats_over_seeds.py --results formats.jsonl --camvid data/camvid
    python benchmarks/formats_over_seeds.py --results formats.jsonl --table

Two data sets: the demo's generated scenes, and CamVid as
configs/intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py describes it (without --camvid: scenes alone), at
half its size on the demo's backbone, both from random weights. Backbones compute in bf16. One process, ZeRO-2,
4 images a step. A seed decides initial values and the order of data. Each training that ends is one line of
JSON in --results: loss (mean of the last tenth of the steps) and mIoU after the last step. What stands there is
not trained again, so a run that was cut off goes on. First come the seeds of fp32, which make the spread,
then all kinds seed by seed. --table prints what the file has.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import optimizer_states
import tuning_modes
import whole_runs
from mmcv import Config
from rich.console import Console
from rich.table import Table

BF16 = optimizer_states.BF16
FP32 = "fp32 states"
KINDS: dict[str, tuple[dict[str, str], dict[str, bool]]] = {
    FP32: ({}, BF16),
    "bf16 weights, 8-bit moments": ({"optimizer_states": "8bit"}, optimizer_states.BF16_WEIGHTS),
    "fp32 weights, 8-bit moments": ({"optimizer_states": "8bit"}, BF16),
    "float8 products": ({"matmul_dtype": "float8"}, BF16),
    "bf16 heads": ({"heads_dtype": "bfloat16"}, BF16),
    "bf16 weights, bf16 moments": ({"optimizer_states": "bf16"}, optimizer_states.BF16_WEIGHTS),
    "fp32 weights, bf16 moments": ({"optimizer_states": "bf16"}, BF16),
}
"""engine's options, and the bf16 section of the ds_config; the most telling first."""
Run = dict[str, Any]


def main() -> None:
    args = options()
    done = runs_of(args.results)
    if not args.table:
        with tempfile.TemporaryDirectory(prefix="formats_") as name:
            train_missing(done, Path(name), args)
    print_tables(done)
    print(json.dumps(done))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines, is added to")
    parser.add_argument("--table", action="store_true", help="only print what the file has")
    parser.add_argument("--camvid", type=Path, help="CamVid's folder")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--fp32-seeds", type=int, default=3, help="that make the spread (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=500, help="on scenes (default: %(default)s)")
    parser.add_argument("--camvid-steps", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=200, help="training images (default: %(default)s)")
    args = parser.parse_args()
    if args.camvid and not (args.camvid / "images/training").is_dir():
        parser.error(f"--camvid {args.camvid} is no folder with CamVid's images/training")
    return args


def runs_of(results: Path) -> list[Run]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def train_missing(done: list[Run], folder: Path, args: argparse.Namespace) -> None:
    """Trains what `done` does not have; adds it there and to the file."""
    optimizer_states.write_scenes(folder / "scenes", args.scenes)
    there = {(run["data"], run["steps"], run["kind"], run["seed"]) for run in done}
    sets = [("scenes", args.steps)] + [("CamVid", args.camvid_steps)] * bool(args.camvid)
    queue = [(*data, FP32, seed) for data in sets for seed in range(args.fp32_seeds)]
    others = [kind for kind in KINDS if kind != FP32]
    queue += [(*data, kind, seed) for seed in range(args.seeds) for kind in others for data in sets]
    for data, steps, kind, seed in queue:
        if (data, steps, kind, seed) in there:
            continue
        began = time.monotonic()
        cfg = experiment(data, kind, steps, folder, args)
        run = {"data": data, "steps": steps, "kind": kind, "seed": seed, **train(cfg, kind, seed, folder)}
        done.append(run)
        with args.results.open("a") as file:
            file.write(json.dumps(run) + "\n")
        print(f"{run}, {time.monotonic() - began:.0f} s", flush=True)


def experiment(data: str, kind: str, steps: int, folder: Path, args: argparse.Namespace) -> Config:
    if data == "scenes":
        cfg = tuning_modes.scenes_experiment(folder / "scenes", steps, interval=0)
    else:
        cfg = tuning_modes.camvid_experiment(args.camvid, steps, "all", None)
    # as on GPUs, and as float8 needs it
    cfg.engine.update(backbone_dtype="bfloat16", **KINDS[kind][0])
    cfg.log_config.interval = 1
    return cfg


def train(cfg: Config, kind: str, seed: int, folder: Path) -> dict[str, float]:
    """Loss and mIoU of a training in a process of its own."""
    ds_config = {"bf16": KINDS[kind][1], "zero_optimization": {"stage": 2}}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        script = "benchmarks/float8_on_cpu.py" if "matmul_dtype" in KINDS[kind][0] else "launch/train.py"
        records = whole_runs.train(cfg, ds_config, Path(name) / "run", "--seed", seed, script=script)
    losses = [record["loss"] for record in records if "loss" in record]
    return {
        "loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "mIoU": next(record["mIoU"] for record in reversed(records) if "mIoU" in record),
    }


def print_tables(runs: list[Run]) -> None:
    for data, steps in dict.fromkeys((run["data"], run["steps"]) for run in runs):
        table = Table("", "seeds", "loss", "from fp32", "mIoU", "from fp32", title=f"{data}, {steps} steps")
        found = [run for run in runs if (run["data"], run["steps"]) == (data, steps)]
        fp32 = {run["seed"]: run for run in found if run["kind"] == FP32}
        for kind in KINDS:
            of_kind = [run for run in found if run["kind"] == kind]
            if of_kind:
                cells = [cell for what in ("loss", "mIoU") for cell in compared(of_kind, fp32, what)]
                table.add_row(kind, str(len(of_kind)), *cells)
        Console(width=110).print(table)


def compared(runs: list[Run], fp32: dict[int, Run], what: str) -> tuple[str, str]:
    """Mean and range of a kind; and its mean difference from fp32 at the same seeds, with "outside" where the
    mean over seeds lies outside of the range of fp32's seeds."""
    digits = 3 if what == "loss" else 2
    values = [run[what] for run in runs]
    mean = statistics.mean(values)
    shown = f"{mean:.{digits}f}"
    if len(values) > 1:
        shown += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    pairs = [run[what] - fp32[run["seed"]][what] for run in runs if run["seed"] in fp32]
    if not pairs or runs[0]["kind"] == FP32:
        return shown, ""
    spread = [run[what] for run in fp32.values()]
    outside = "" if min(spread) <= mean <= max(spread) else ", outside"
    return shown, f"{statistics.mean(pairs):+.{digits}f}{outside}"


if __name__ == "__main__":
    main()
