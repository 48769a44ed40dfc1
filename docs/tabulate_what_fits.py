"""Writes docs/what_fits.md: what full tuning of InternViT-6B needs on several GPUs under each ds_config,
estimated. The README has some of its rows.

python docs/tabulate_what_fits.py
"""

import argparse
from pathlib import Path

from internseg_ds.config.experiment import read_experiment
from internseg_ds.planning.devices import DEVICES, Cluster, Device
from internseg_ds.planning.estimate import Estimate, compare, fastest
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.step_time import Assumptions
from internseg_ds.planning.tables import GIB

RECIPE = "configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py"
DS_CONFIGS = [
    Path("ds_configs", f"{name}.json")
    for name in (
        "zero1_bf16",
        "zero2_bf16",
        "zero3_bf16",
        "zero3_bf16_hpz",
        "zero3_autocast",
        "zero3_bf16_offload_optimizer",
        "zero3_bf16_offload_all",
    )
]
GPUS = ("RTX4090", "A100-40GB", "L40S", "A100", "H100", "H200", "B200")
COUNTS = (1, 2, 4, 8, 16)
OPENING = """# What fits where

Full tuning of InternViT-6B with UPerNet at 504 x 504, 2 images per GPU. **Every figure is estimated, none is measured** \
(`launch/plan.py`; at 45 % of the peak TFLOP/s, nodes of 8 GPUs,
50 GB/s per GPU between nodes; GPUs without NVLink over PCIe). One row by itself: `python launch/plan.py CONFIG --gpu H200 --gpus 1`. \
All of it: `python docs/tabulate_what_fits.py`.
"""


def estimates(estimator: Estimator, device: Device, count: int) -> dict[Path, Estimate | str]:
    """Under each of DS_CONFIGS, on so many GPUs."""
    per_node = min(count, 8)
    return compare(estimator, DS_CONFIGS, Cluster(device, count // per_node, per_node, 50.0), Assumptions())


def cell(estimate: Estimate | str) -> str:
    """Of the table over ds_configs; empty where the ds_config cannot be used."""
    if isinstance(estimate, str):
        return ""
    peak = f"{estimate.memory.peak / GIB:.0f}"
    if not estimate.memory.fits:
        return f"no ({peak})"
    return f"**{peak}**{host(estimate)}, {images_per_s(estimate)}/s"


def host(estimate: Estimate) -> str:
    """What the host holds where something is offloaded to it."""
    offloads = any(part.host for part in estimate.memory.parts if part.name != "process and context")
    return f" + {estimate.memory.whole_host / GIB:.0f} host" if offloads else ""


def images_per_s(estimate: Estimate) -> str:
    return f"{estimate.step.images_per_s:.3g}" if estimate.step is not None else "?"


def best(found: dict[Path, Estimate | str]) -> str:
    """Of the table of the fastest that fit."""
    path = fastest(found)
    estimate = found[path] if path is not None else None
    if path is None or not isinstance(estimate, Estimate):
        return "nothing"
    chosen = estimate.experiment.engine.recomputation == "auto"
    policy = f", {estimate.checkpointing}" if chosen else ""
    return (
        f"`{path.stem}`{policy}: {estimate.memory.peak / GIB:.0f} GiB{host(estimate)}, "
        f"{images_per_s(estimate)}/s"
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    published = Estimator(read_experiment(RECIPE, {"engine.recomputation": "config"}))
    auto = Estimator(read_experiment(RECIPE))
    short = [
        '| GPU | count | activation checkpointing of the recipe | `engine.recomputation="auto"` |',
        "|---|---|---|---|",
    ]
    long = [
        f"| GPU, GiB | count | {' | '.join(path.stem for path in DS_CONFIGS)} |",
        "|---|---|" + "---|" * len(DS_CONFIGS),
    ]
    for name in GPUS:
        device = DEVICES[name]
        for count in COUNTS:
            found = estimates(published, device, count)
            long.append(
                f"| {name}, {device.memory_gib:g} | {count} | {' | '.join(map(cell, found.values()))} |"
            )
            short.append(f"| {name} | {count} | {best(found)} | {best(estimates(auto, device, count))} |")
    legend = (
        "Bold: it fits; the peak per GPU in GiB, `+` what the host holds, and images per second. no (N): "
        "it would need N GiB. "
        "Empty: hpZ is for whole nodes of 8."
    )
    second = (
        "## The fastest that fits\n\nThe ds_config, and what of the blocks is recomputed "
        "where the engine may choose."
    )
    Path(__file__).with_name("what_fits.md").write_text(
        "\n\n".join([OPENING.strip(), legend, "\n".join(long), second, "\n".join(short)]) + "\n"
    )


if __name__ == "__main__":
    main()
