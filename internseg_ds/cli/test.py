"""Evaluates a trained segmentor with mmseg's metrics."""

import argparse
from typing import NoReturn

from internseg_ds.cli.loading import loading
from internseg_ds.progress import stage


def _parser() -> argparse.ArgumentParser:
    from internseg_ds.cli import command_line

    parser = command_line.parser(
        "Evaluates a trained segmentor with mmseg's metrics, in one process or split over many (deepspeed, "
        "torchrun, srun).",
        "deepspeed --num_gpus 2 launch/test.py "
        "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py \\\n"
        "      work_dirs/demo/segmentor.pth --eval mIoU --out work_dirs/demo/evaluation",
    )
    command_line.add_config(parser)
    parser.add_argument(
        "checkpoint",
        help=".pth or .safetensors file, folder of safetensors, or a ZeRO checkpoint directory "
        "(WORK_DIR/checkpoints)",
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        metavar="METRIC",
        help="mIoU, mDice, mFscore (default: the config's evaluation.metric)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write results.json, per_class.csv, confusion.png, and overlays of the best and worst images "
        "into this folder",
    )
    parser.add_argument(
        "--extremes",
        type=command_line.count,
        default=5,
        metavar="N",
        help="how many of the best and of the worst images (default: %(default)s)",
    )
    parser.add_argument(
        "--format-only",
        metavar="DIR",
        help="score nothing: write the files that the benchmark's server takes into this folder (ADE20K, "
        "Cityscapes, ...)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="an image that cannot be read is an error; without it, it is left out, counted and named",
    )
    parser.add_argument(
        "--show-dir", metavar="DIR", help="write image, ground truth and prediction side by side as PNGs"
    )
    parser.add_argument(
        "--show-count",
        type=command_line.count,
        default=20,
        metavar="N",
        help="how many of them (default: %(default)s)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="evaluate the averaged weights of a ZeRO checkpoint of a run with engine.ema",
    )
    command_line.add_checksum_option(parser)
    command_line.add_config_options(parser)
    return parser


def _main() -> None:
    from internseg_ds.cli import command_line

    parser = _parser()
    args = parser.parse_args()

    with stage("loading mmseg"):
        from internseg_ds.evaluation.test import test, write_submission

    if args.format_only and (args.eval or args.out or args.show_dir):
        parser.error("--format-only scores nothing, so --eval, --out and --show-dir make no sense beside it")
    if args.format_only:
        write_submission(
            args.config,
            args.checkpoint,
            args.format_only,
            strict=args.strict,
            ema=args.ema,
            cfg_options=command_line.settings_of(args),
        )
    else:
        test(
            args.config,
            args.checkpoint,
            metrics=args.eval,
            out=args.out,
            extremes=args.extremes,
            show_dir=args.show_dir,
            show_count=args.show_count,
            strict=args.strict,
            ema=args.ema,
            cfg_options=command_line.settings_of(args),
        )


def main() -> NoReturn:
    """The command."""
    with loading("torch and mmcv"):
        from internseg_ds.cli import command_line

    command_line.run(_main)


if __name__ == "__main__":
    main()
