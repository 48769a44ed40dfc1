"""Turns a ZeRO checkpoint into one ordinary file."""

import argparse
import difflib
from pathlib import Path
from typing import NoReturn

from internseg_ds.cli import command_line
from internseg_ds.progress import stage

FORMATS = ("huggingface",)


def _main() -> None:
    parser = command_line.parser(
        "Turns a ZeRO checkpoint (any stage, any number of processes) into one mmseg .pth or into "
        "safetensors. Needs no GPU.",
        "python launch/consolidate.py work_dirs/demo/checkpoints work_dirs/demo/segmentor.pth",
    )
    parser.add_argument("source", type=Path, help="WORK_DIR, its checkpoints folder, or one iter_N in it")
    parser.add_argument(
        "out",
        type=Path,
        help="file ending in .pth or .safetensors, or a folder for sharded safetensors with an index",
    )
    parser.add_argument(
        "--tag",
        metavar="iter_N",
        help="which checkpoint of the folder (default: the latest; 'best' for the best score)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the backbone; heads stay float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--backbone",
        metavar="LAYOUT",
        help="the backbone alone, in a layout in which its weights are published, such as transformers; "
        "another name is answered with the backbone's own list",
    )
    parser.add_argument(
        "--format",
        metavar="huggingface",
        help="a folder that transformers loads: weights, config.json, preprocessor_config.json, a model card, and "
        "code where transformers has no such class",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        type=command_line.given,
        help="with --format huggingface: upload the folder to REPO of the Hugging Face hub, which is made, and is "
        "private, where there is none; needs a login (hf auth login, or HF_TOKEN)",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="the low-rank adapters alone, of a run with engine.tune=dict(lora=...), as a folder that peft "
        "reads; without it they are merged into the weights",
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights, of a run with engine.ema")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="write nothing: hold OUT against the checksums that were written with it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    command_line.add_checksum_option(parser)
    args = parser.parse_args()

    _check_together(parser, args)
    _write(args)


def _check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that contradict each other end the command."""
    if args.format is not None and args.format not in FORMATS:
        near = difflib.get_close_matches(args.format, FORMATS, n=1, cutoff=0.4)
        parser.error(
            f"--format {args.format}: there is no such format"
            + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(FORMATS)}")
        )
    forms = [f"--{name}" for name in ("format", "adapters", "backbone") if getattr(args, name)]
    if len(forms) > 1:
        parser.error(f"{' and '.join(forms)} write different things; give one of them")
    if args.push_to_hub and not args.format:
        parser.error("--push-to-hub uploads the folder of --format huggingface; give that too")


def _write(args: argparse.Namespace) -> None:
    with stage("loading torch and mmcv"):
        from internseg_ds.checkpoints.checksum_files import sum_file, verify
        from internseg_ds.checkpoints.consolidate import consolidate

    if args.verify:
        verify(args.out)
        print(f"{args.out} agrees with its checksums")
        return
    if args.push_to_hub:
        from internseg_ds.evaluation.hub import check_repository

        check_repository(args.push_to_hub)
    settings = dict(
        dtype=args.dtype, tag=args.tag, ema=args.ema, overwrite=args.overwrite, check=not args.skip_checksums
    )
    if args.format:
        from internseg_ds.evaluation.huggingface import export_huggingface

        export_huggingface(args.source, args.out, **settings)
    elif args.adapters:
        from internseg_ds.checkpoints.adapter_export import export_adapters

        export_adapters(args.source, args.out, **settings)
    elif args.backbone:
        from internseg_ds.evaluation.export import export_backbone

        export_backbone(args.source, args.out, args.backbone, **settings)
    else:
        consolidate(args.source, args.out, **settings)
    how = "; README.md in it says how it is loaded" if args.format else ""
    print(f"{args.out} is written, and its checksums are beside it ({sum_file(args.out).name}){how}")
    if args.push_to_hub:
        from internseg_ds.evaluation.hub import push_to_hub

        print(f"{args.out} is uploaded: {push_to_hub(args.out, args.push_to_hub)}")


def main() -> NoReturn:
    """The command."""
    command_line.run(_main)


if __name__ == "__main__":
    main()
