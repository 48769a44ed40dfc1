"""Writes docs/what_fits.md: what full tuning of InternViT-6B needs on several GPUs under each ds_config, planned. The README has some of its rows.

python docs/tabulate_what_fits.py
"""

from pathlib import Path

from internseg_ds.engine.experiment import read_experiment
from internseg_ds.engine.forecast import GIB, Forecast, compare, fastest
from internseg_ds.engine.planner import Planner
from internseg_ds.planning.devices import DEVICES, Device
from internseg_ds.planning.step_time import Assumptions, Cluster

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

Full tuning of InternViT-6B with UPerNet at 504 x 504, 2 images per GPU. **Every figure is planned, none is measured** \
(`launch/plan.py`; at 45 % of the peak TFLOP/s, nodes of 8 GPUs,
50 GB/s per GPU between nodes; GPUs without NVLink over PCIe). One row by itself: `python launch/plan.py CONFIG --gpu H200 --gpus 1`. \
All of it: `python docs/tabulate_what_fits.py`.
"""


def found(planner: Planner, device: Device, count: int) -> dict[Path, Forecast | str]:
    per_node = min(count, 8)
    return compare(
        planner,
        DS_CONFIGS,
        Cluster(device, count // per_node, per_node, 50.0),
        Assumptions(),
        device.memory_gib * GIB,
        None,
    )


def cell(plan: Forecast | str) -> str:
    if isinstance(plan, str):
        return ""
    peak = f"{plan.footprint.peak / GIB:.0f}"
    if not plan.fits:
        return f"no ({peak})"
    return f"**{peak}**{host(plan)}, {plan.row.images_per_s:.3g}/s"


def host(plan: Forecast) -> str:
    offloads = any(part.host for part in plan.footprint.parts if part.name != "process and context")
    return f" + {plan.host / GIB:.0f} host" if offloads else ""


def best(plans: dict[Path, Forecast | str]) -> str:
    if (path := fastest(plans)) is None:
        return "nothing"
    plan = plans[path]
    recomputes = (
        f", {plan.planner.recomputation}" if plan.planner.experiment.engine.recomputation == "auto" else ""
    )
    return f"`{path.stem}`{recomputes}: {plan.footprint.peak / GIB:.0f} GiB{host(plan)}, {plan.row.images_per_s:.3g}/s"


def main() -> None:
    published, auto = (
        Planner(read_experiment(RECIPE, options)) for options in ({"engine.recomputation": "config"}, {})
    )
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
            plans = found(published, device, count)
            long.append(
                f"| {name}, {device.memory_gib:g} | {count} | {' | '.join(map(cell, plans.values()))} |"
            )
            short.append(f"| {name} | {count} | {best(plans)} | {best(found(auto, device, count))} |")
    legend = (
        "Bold: it fits; the peak per GPU in GiB, `+` what the host holds, and images per second. no (N): it would need N GiB. "
        "Empty: hpZ is for whole nodes of 8."
    )
    second = "## The fastest that fits\n\nThe ds_config, and what of the blocks is recomputed where the engine may choose."
    Path(__file__).with_name("what_fits.md").write_text(
        "\n\n".join([OPENING.strip(), legend, "\n".join(long), second, "\n".join(short)]) + "\n"
    )


if __name__ == "__main__":
    main()
