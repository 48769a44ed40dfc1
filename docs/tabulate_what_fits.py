"""Writes docs/what_fits.md: what full tuning of InternViT-6B needs on several GPUs under each ds_config,
estimated. The README has some of its rows.

python docs/tabulate_what_fits.py
"""

import argparse
from collections.abc import Mapping
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
COMPACT = [
    ("bf16", Path("ds_configs/zero3_bf16.json")),
    ("8bit", Path("ds_configs/zero3_bf16.json")),
    ("bf16", Path("ds_configs/zero3_bf16_only.json")),
    ("8bit", Path("ds_configs/zero3_bf16_only.json")),
]
"""engine.optimizer_states other than fp32, and a ds_config."""
GPUS = ("RTX4090", "A100-40GB", "L40S", "A100", "H100", "H200", "B200")
COUNTS = (1, 2, 4, 8, 16)
OPENING = """# What fits where

Full tuning of InternViT-6B with UPerNet at 504 x 504, 2 images per GPU. **Every figure is estimated, none is measured** \
(`launch/plan.py`; at 45 % of the peak TFLOP/s, nodes of 8 GPUs,
50 GB/s per GPU between nodes; GPUs without NVLink over PCIe). One row by itself: `python launch/plan.py CONFIG --gpu H200 --gpus 1`. \
All of it: `python docs/tabulate_what_fits.py`.
"""


Found = dict[Path, Estimate | str]
"""By the ds_config, and behind its name engine.optimizer_states where that is not fp32."""


def estimates(by_states: Mapping[str, Estimator], device: Device, count: int) -> tuple[Found, Found]:
    """Under each of DS_CONFIGS, and of COMPACT, on so many GPUs."""
    per_node = min(count, 8)
    cluster = Cluster(device, count // per_node, per_node, 50.0)
    usual = compare(by_states["fp32"], DS_CONFIGS, cluster, Assumptions())
    compact = {
        Path(f"{path.stem} {states}"): compare(by_states[states], [path], cluster, Assumptions())[path]
        for states, path in COMPACT
    }
    return usual, compact


def estimators(recomputation: str) -> dict[str, Estimator]:
    """By engine.optimizer_states."""
    return {
        states: Estimator(
            read_experiment(
                RECIPE, {"engine.recomputation": recomputation, "engine.optimizer_states": states}
            )
        )
        for states in ("fp32", "bf16", "8bit")
    }


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


def best(found: Found) -> str:
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


def best_with(usual: Found, compact: Found) -> str:
    """`best`, with `compact` where that is faster."""
    paths = fastest(usual), fastest(compact)
    rates = [
        one.step.images_per_s if isinstance(one, Estimate) and one.step is not None else 0.0
        for one in (found.get(path) if path else None for found, path in zip((usual, compact), paths))
    ]
    return best(compact if rates[1] > rates[0] else usual)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    published, auto = estimators("config"), estimators("auto")
    short = [
        '| GPU | count | activation checkpointing of the recipe | `engine.recomputation="auto"` '
        "| the same, with other `engine.optimizer_states` where that is faster |",
        "|---|---|---|---|---|",
    ]
    names = [path.stem for path in DS_CONFIGS] + [f"{path.stem} {states}" for states, path in COMPACT]
    long = [f"| GPU, GiB | count | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for name in GPUS:
        device = DEVICES[name]
        for count in COUNTS:
            usual, compact = estimates(published, device, count)
            cells = map(cell, [*usual.values(), *compact.values()])
            long.append(f"| {name}, {device.memory_gib:g} | {count} | {' | '.join(cells)} |")
            of_auto, compact = estimates(auto, device, count)
            bests = (best(usual), best(of_auto), best_with(of_auto, compact))
            short.append(f"| {name} | {count} | {' | '.join(bests)} |")
    legend = (
        "Bold: it fits; the peak per GPU in GiB, `+` what the host holds, and images per second. no (N): "
        "it would need N GiB. "
        "Empty: hpZ is for whole nodes of 8. "
        'The last four columns: with engine.optimizer_states="bf16" or "8bit" ([what that does to a training]'
        "(performance.md))."
    )
    second = (
        "## The fastest that fits\n\nThe ds_config, and what of the blocks is recomputed "
        "where the engine may choose. The last column has the formats of optimizer states with fewer bytes, "
        "behind the ds_config; their losses are not those of fp32 states to the last bit, so they are a choice."
    )
    Path(__file__).with_name("what_fits.md").write_text(
        "\n\n".join([OPENING.strip(), legend, "\n".join(long), second, "\n".join(short)]) + "\n"
    )


if __name__ == "__main__":
    main()
