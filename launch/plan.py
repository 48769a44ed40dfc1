"""Says on paper what a run will take."""

import argparse

from internseg_ds.engine import command_line
from internseg_ds.planning.devices import DEVICES

UNITS = {
    "GiB": 2**30,
    "TiB": 2**40,
    "MiB": 2**20,
    "GB": 10**9,
    "TB": 10**12,
    "MB": 10**6,
    "G": 2**30,
    "T": 2**40,
    "M": 2**20,
}


def numbers(text: str) -> list[int]:
    """The type of an option that lists counts: whole numbers of at least 1, with commas between."""
    return [number(part) for part in text.split(",")]


def number(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    try:
        if 0 < (found := float(text)) < float("inf"):
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def memory(text: str) -> float:
    """Bytes of "80GiB", "1.5 TB" and the like."""
    for unit, size in UNITS.items():
        if text.lower().endswith(unit.lower()):
            return positive(text[: -len(unit)]) * size
    raise argparse.ArgumentTypeError(f"{text} has no unit; write 80GiB, or one of {', '.join(UNITS)}")


def gpu(text: str) -> str:
    return next((name for name in DEVICES if name.lower() == text.lower()), text)


def main() -> None:
    parser = command_line.parser(
        "Says what a training run will take before any GPU is taken: memory part by part, bytes sent, seconds per step, hours, disk, "
        "and which ds_configs fit; or, with --nodes, how that goes over clusters of several sizes. Pure arithmetic.",
        "python launch/plan.py configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py \\\n"
        "      --deepspeed_config ds_configs/zero3_bf16.json --gpus 8 --gpu H100",
    )
    parser.add_argument("config", help="experiment config (MMSegmentation 0.x format)")
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        default="ds_configs/zero3_bf16.json",
        metavar="JSON",
        help="DeepSpeed JSON; the others of its folder are compared with it (default: %(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--gpus", type=number, metavar="N", help="plan for N GPUs (default: one node)")
    size.add_argument(
        "--nodes",
        type=numbers,
        metavar="N,N,...",
        help="a table over numbers of nodes, such as 1,2,4,8,16,32,64",
    )
    parser.add_argument(
        "--gpus-per-node",
        type=number,
        default=8,
        metavar="N",
        help="processes of a node (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu",
        type=gpu,
        choices=DEVICES,
        default="H100",
        help="figures by the makers' data sheets (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu-memory", type=memory, metavar="SIZE", help="of one GPU, such as 80GiB (default: the GPU's)"
    )
    parser.add_argument(
        "--host-memory",
        type=memory,
        metavar="SIZE",
        help="of one host, such as 1TiB (default: not looked at)",
    )
    parser.add_argument(
        "--interconnect",
        type=positive,
        default=50.0,
        metavar="GB/s",
        help="between nodes, per GPU and direction (default: %(default)s, a 400 Gbit/s adapter each)",
    )
    parser.add_argument(
        "--nvlink",
        type=positive,
        metavar="GB/s",
        help="within a node, per GPU and direction (default: the GPU's)",
    )
    parser.add_argument(
        "--achieved",
        type=positive,
        default=0.45,
        metavar="SHARE",
        help="of the peak TFLOP/s; an assumption (default: %(default)s)",
    )
    command_line.add_config_options(parser)
    args = parser.parse_args()
    if args.achieved > 1:
        parser.error(
            f"--achieved {args.achieved:g} is more than all of the peak; it is a share, such as 0.45"
        )
    if args.nodes and (args.gpu_memory or args.host_memory):
        parser.error(
            "--nodes makes a table of time, without memory; give --gpu-memory and --host-memory with --gpus"
        )
    gpus = args.gpus or args.gpus_per_node
    per_node = min(gpus, args.gpus_per_node)
    if gpus % per_node:
        parser.error(
            f"--gpus {gpus} do not fill nodes of {per_node}; choose a multiple, or set --gpus-per-node"
        )

    from dataclasses import replace
    from pathlib import Path

    from internseg_ds.engine.experiment import read_experiment
    from internseg_ds.engine.forecast import (
        compare,
        describe_comparison,
        describe_forecast,
        forecast,
        wide_console,
    )
    from internseg_ds.engine.planner import Planner
    from internseg_ds.engine.scaling import describe_scaling, plan_scaling
    from internseg_ds.planning.step_time import Assumptions, Cluster

    device, console, assumed = DEVICES[args.gpu], wide_console(), Assumptions(compute=args.achieved)
    if args.nvlink:
        device = replace(device, nvlink_gbs=args.nvlink)
    experiment = read_experiment(args.config, args.cfg_options)
    if args.nodes:
        clusters = [Cluster(device, nodes, args.gpus_per_node, args.interconnect) for nodes in args.nodes]
        describe_scaling(plan_scaling(experiment, args.deepspeed_config, clusters, assumed), console)
        return
    cluster = Cluster(device, gpus // per_node, per_node, args.interconnect)
    planner, given = Planner(experiment), Path(args.deepspeed_config)
    sizes = args.gpu_memory or device.memory_gib * 2**30, args.host_memory
    chosen = forecast(planner, given, cluster, assumed, *sizes)
    describe_forecast(chosen, cluster, console)
    others = [path for path in sorted(given.parent.glob("*.json")) if path != given]
    found = {given: chosen, **compare(planner, others, cluster, assumed, *sizes)}
    describe_comparison(planner, dict(sorted(found.items())), cluster, assumed, console)


if __name__ == "__main__":
    command_line.run(main)
