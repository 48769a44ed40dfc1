"""Segments images with a trained segmentor."""

from typing import NoReturn

from internseg_ds.cli import command_line


def _main() -> None:
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
    command_line.add_checksum_option(parser)
    command_line.add_config_options(parser)
    args = parser.parse_args()

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


def main() -> NoReturn:
    """The command."""
    command_line.run(_main)


if __name__ == "__main__":
    main()
