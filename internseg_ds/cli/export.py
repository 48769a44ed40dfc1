"""Writes a trained segmentor as ONNX or TorchScript."""

import argparse
from pathlib import Path
from typing import NoReturn

from internseg_ds.cli import command_line
from internseg_ds.progress import stage


def _main() -> None:
    parser = command_line.parser(
        "Writes a trained segmentor as a file that runs without this package: ONNX, or TorchScript for one size of "
        "images. From RGB pixels to logits, checked against the segmentor. Needs no GPU.",
        "python launch/export.py work_dirs/demo segmentor.onnx --dynamic batch",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="work directory or a checkpoint in it, or what launch/consolidate.py has written",
    )
    parser.add_argument("out", type=Path, help="NAME.onnx, or NAME.pt for TorchScript")
    parser.add_argument("--config", type=Path, help="experiment config, where the weights carry none")
    parser.add_argument(
        "--size",
        nargs=2,
        type=pixels,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, in pixels (default: the window of the evaluation)",
    )
    parser.add_argument(
        "--dynamic",
        nargs="?",
        choices=("none", "batch", "size"),
        default="none",
        const="size",
        help="what may differ from call to call: the number of images (batch), or that and their size (size, which "
        "--dynamic alone means)",
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights, of a run with engine.ema")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    command_line.add_checksum_option(parser)
    args = parser.parse_args()

    with stage("loading mmseg"):
        from internseg_ds.evaluation.deployment.export import export_segmentor
    files = export_segmentor(
        args.source,
        args.out,
        config=args.config,
        size=args.size,
        dynamic=args.dynamic,
        ema=args.ema,
        overwrite=args.overwrite,
        check=not args.skip_checksums,
    )
    print(f"written: {', '.join(f'{file} ({file.stat().st_size / 2**20:.1f} MiB)' for file in files)}")


def pixels(text: str) -> int:
    """The type of a side."""
    if (number := command_line.count(text)) == 0:
        raise argparse.ArgumentTypeError("0 pixels are no image")
    return number


def main() -> NoReturn:
    """The command."""
    command_line.run(_main)


if __name__ == "__main__":
    main()
