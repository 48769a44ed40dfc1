"""Segments images with a trained segmentor."""

import argparse
from typing import NoReturn

from internseg_ds.cli.loading import loading
from internseg_ds.progress import stage


def _main() -> None:
    from internseg_ds.cli import command_line

    parser = command_line.parser(
        "Segments images with a trained segmentor: an overlay with a legend and a label map for each. In "
        "one process or split over many.",
        "python launch/predict.py configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py "
        "work_dirs/demo/segmentor.pth \\\n"
        "      data/ade/ADEChallengeData2016/images/validation --out predictions",
    )
    command_line.add_config(parser)
    parser.add_argument(
        "checkpoint", help=".pth or .safetensors file, folder of safetensors, or a ZeRO checkpoint directory"
    )
    parser.add_argument(
        "images",
        nargs="+",
        help="image files, folders of them (video frames, say), or quoted globs such as 'frames/**/*.png'",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="writes NAME_overlay.png and NAME_labels.png (class indices) into this folder",
    )
    parser.add_argument(
        "--logits", action="store_true", help="write NAME_logits.npy too: (classes, h, w) float32"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="an image that cannot be read is an error; without it, it is left out and named",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="use the averaged weights of a ZeRO checkpoint of a run with engine.ema",
    )
    _add_scene_options(parser)
    command_line.add_checksum_option(parser)
    command_line.add_config_options(parser)
    args = parser.parse_args()
    if args.scenes:
        _predict_scenes(parser, args)
        return
    if given := next((name for name in ("shapes", "blend", "memory") if getattr(args, name)), None):
        parser.error(f"--{given} goes with --scenes")

    with stage("loading mmseg"):
        from internseg_ds.evaluation.predict import predict_files

    predict_files(
        args.config,
        args.checkpoint,
        args.images,
        args.out,
        logits=args.logits,
        strict=args.strict,
        ema=args.ema,
        cfg_options=command_line.settings_of(args),
    )


def _add_scene_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scenes: rasters and images of any size, larger than memory too")
    group.add_argument(
        "--scenes",
        action="store_true",
        help="read, segment and write by windows, in bounded memory, at the resolution that the scene has; writes "
        "NAME_labels.tif, a GeoTIFF with the georeference of the scene, in place of pictures (needs rasterio)",
    )
    group.add_argument(
        "--shapes",
        action="store_true",
        help="write NAME_shapes.geojson too: the regions as polygons, in longitude and latitude where the scene has a "
        "CRS, else in pixels",
    )
    group.add_argument(
        "--blend",
        choices=("mean", "tapered"),
        help="how overlapping windows become one: their mean as in launch/test.py (default), or with weights that fall "
        "to the borders of a window, which leaves no seams",
    )
    group.add_argument(
        "--memory",
        type=_gibibytes,
        metavar="GIB",
        help="for what is held of a row of windows (default: a quarter of the free memory); wider scenes are segmented "
        "in several pieces",
    )


def _gibibytes(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _predict_scenes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from internseg_ds.cli import command_line

    if given := next((name for name in ("logits", "strict") if getattr(args, name)), None):
        parser.error(f"--{given} does not go with --scenes")

    with stage("loading mmseg"):
        from internseg_ds.evaluation.scenes.predict import predict_scenes
        from internseg_ds.evaluation.scenes.segmentation import SceneOptions

    predict_scenes(
        args.config,
        args.checkpoint,
        args.images,
        args.out,
        options=SceneOptions(args.blend or "mean", args.shapes, args.memory),
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
