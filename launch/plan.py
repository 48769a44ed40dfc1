"""Says on paper what a run will take."""

import argparse

from internseg_ds.engine import command_line
from internseg_ds.planning.devices import DEVICES


def numbers(text: str) -> list[int]:
    """The type of an option that lists counts: whole numbers of at least 1, with commas between."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{min(found)} is below 1")
    return found


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def main() -> None:
    parser = command_line.parser(
        "Says what a training run will take on clusters of several sizes, before any GPU is taken: memory, bytes sent, seconds per step, hours. Pure arithmetic.",
        "python launch/plan.py configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py \\\n"
        "      --deepspeed_config ds_configs/zero3_bf16.json --gpu H100")
    parser.add_argument("config", help="experiment config (MMSegmentation 0.x format)")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", default="ds_configs/zero3_bf16.json", metavar="JSON", help="DeepSpeed JSON (default: %(default)s)")
    parser.add_argument("--nodes", type=numbers, default="1,2,4,8,16,32,64", metavar="N,N,...", help="numbers of nodes, a row each (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=numbers, default="8", metavar="N", help="processes of a node (default: %(default)s)")
    parser.add_argument("--gpu", choices=DEVICES, default="H100", help="figures by the makers' data sheets (default: %(default)s)")
    parser.add_argument("--interconnect", type=positive, default=50.0, metavar="GB/s", help="between nodes, per GPU and direction (default: %(default)s, a 400 Gbit/s adapter each)")
    parser.add_argument("--nvlink", type=positive, metavar="GB/s", help="within a node, per GPU and direction (default: the GPU's)")
    parser.add_argument("--achieved", type=positive, default=0.45, metavar="SHARE", help="of the peak TFLOP/s; an assumption (default: %(default)s)")
    command_line.add_config_options(parser)
    args = parser.parse_args()
    if len(args.gpus_per_node) != 1:
        parser.error("--gpus-per-node takes one number")
    if args.achieved > 1:
        parser.error(f"--achieved {args.achieved:g} is more than all of the peak; it is a share, such as 0.45")

    from dataclasses import replace

    from rich.console import Console

    from internseg_ds.engine.experiment import read_experiment
    from internseg_ds.engine.scaling import describe_scaling, plan_scaling
    from internseg_ds.planning.step_time import Assumptions, Cluster

    device = DEVICES[args.gpu]
    if args.nvlink:
        device = replace(device, nvlink_gbs=args.nvlink)
    clusters = [Cluster(device, nodes, args.gpus_per_node[0], args.interconnect) for nodes in args.nodes]
    plan = plan_scaling(read_experiment(args.config, args.cfg_options), args.deepspeed_config, clusters, Assumptions(compute=args.achieved))
    describe_scaling(plan, Console())


if __name__ == "__main__":
    command_line.run(main)
