"""Estimates what a training run will need, before any GPU is taken."""

import argparse
from typing import NoReturn

from internseg_ds.cli import command_line
from internseg_ds.planning.devices import DEVICES
from internseg_ds.progress import stage

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
    """The type of an option that lists counts, with commas between. Raises ArgumentTypeError."""
    return [number(part) for part in text.split(",")]


def number(text: str) -> int:
    """The type of an option that is a count. Raises ArgumentTypeError."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """The type of an option that is a finite number above 0. Raises ArgumentTypeError."""
    try:
        if 0 < (found := float(text)) < float("inf"):
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def memory(text: str) -> float:
    """Bytes of "80GiB", "1.5 TB" and the like. Raises ArgumentTypeError."""
    for unit, size in UNITS.items():
        if text.lower().endswith(unit.lower()):
            return positive(text[: -len(unit)]) * size
    raise argparse.ArgumentTypeError(f"{text} has no unit; write 80GiB, or one of {', '.join(UNITS)}")


def gpu(text: str) -> str:
    """The name of a known GPU in its usual spelling; of others, what was given."""
    return next((name for name in DEVICES if name.lower() == text.lower()), text)


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.parser(
        "Estimates what a training run will need before any GPU is taken: memory part by part, bytes sent, "
        "seconds per step, hours, disk, "
        "and which ds_configs fit; or, with --nodes, how that goes over clusters of several sizes. Pure "
        "arithmetic.",
        "python launch/plan.py "
        "configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py \\\n"
        "      --deepspeed_config ds_configs/zero3_bf16.json --gpus 8 --gpu H100",
    )
    command_line.add_config(parser)
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        default="ds_configs/zero3_bf16.json",
        metavar="JSON",
        help="DeepSpeed JSON; the others of its folder are compared with it (default: %(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--gpus", type=number, metavar="N", help="estimate for N GPUs (default: one node)")
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
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with an error message for values that do not go together."""
    if args.achieved > 1:
        parser.error(
            f"--achieved {args.achieved:g} is more than all of the peak; it is a share, such as 0.45"
        )
    if args.nodes and (args.gpu_memory or args.host_memory):
        parser.error(
            "--nodes makes a table with the GPU's own memory; give --gpu-memory and --host-memory with --gpus"
        )
    if gpus(args) % per_node(args):
        parser.error(
            f"--gpus {gpus(args)} do not fill nodes of {per_node(args)}; choose a multiple, or set "
            "--gpus-per-node"
        )


def gpus(args: argparse.Namespace) -> int:
    return args.gpus or args.gpus_per_node


def per_node(args: argparse.Namespace) -> int:
    return min(gpus(args), args.gpus_per_node)


def _main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_arguments(parser, args)

    # after the arguments are known to be right: these take seconds to import
    from contextlib import suppress
    from dataclasses import replace

    with stage(f"loading mmseg, reading {args.config}"):
        from internseg_ds.config.experiment import read_experiment
        from internseg_ds.config.packaged import DS_CONFIGS, find
        from internseg_ds.errors import ConfigError
        from internseg_ds.planning.devices import Cluster
        from internseg_ds.planning.estimate import compare, estimate, estimate_scaling, without_zero
        from internseg_ds.planning.estimator import Estimator
        from internseg_ds.planning.step_time import Assumptions
        from internseg_ds.planning.tables import (
            print_comparison,
            print_estimate,
            print_scaling,
            print_without_zero,
            wide_console,
        )

        experiment = read_experiment(args.config, args.cfg_options)
    console = wide_console()
    assumed = Assumptions(compute=args.achieved)
    device = DEVICES[args.gpu]
    if args.nvlink:
        device = replace(device, nvlink_gbs=args.nvlink)
    if args.gpu_memory:
        device = replace(device, memory_gib=args.gpu_memory / 2**30)
    estimator = Estimator(experiment)
    if args.nodes:
        clusters = [Cluster(device, nodes, args.gpus_per_node, args.interconnect) for nodes in args.nodes]
        print_scaling(estimate_scaling(estimator, args.deepspeed_config, clusters, assumed), console)
        return
    cluster = Cluster(
        device, gpus(args) // per_node(args), per_node(args), args.interconnect, args.host_memory
    )
    given = find(args.deepspeed_config, DS_CONFIGS)
    with stage("planning", after_s=2.0):
        chosen = estimate(estimator, given, cluster, assumed)
    print_estimate(chosen, console)
    others = [path for path in sorted(given.parent.glob("*.json")) if path != given]
    with stage(f"planning with {len(others)} other ds_configs", after_s=2.0):
        found = {given: chosen, **compare(estimator, others, cluster, assumed)}
    print_comparison(dict(sorted(found.items())), chosen, console)
    with suppress(ConfigError):  # of settings that are ZeRO's alone
        print_without_zero(without_zero(estimator, cluster), console)


def main() -> NoReturn:
    """The command."""
    command_line.run(_main)


if __name__ == "__main__":
    main()
