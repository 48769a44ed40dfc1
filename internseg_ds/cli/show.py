"""Shows what a trained segmentor makes of images, on a page of this machine's own."""

from typing import NoReturn

from internseg_ds.cli import command_line
from internseg_ds.progress import stage


def _main() -> None:
    parser = command_line.parser(
        "Shows what a trained segmentor makes of images: a page to drop an image on, with the labels over it, the "
        "area and the mean score of each class, and the class under the pointer. Nothing leaves this machine.",
        "python launch/show.py work_dirs/demo",
    )
    parser.add_argument(
        "checkpoint",
        help="a work directory or a ZeRO checkpoint in it, a .pth, .safetensors or folder of launch/consolidate.py",
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="experiment config, where the weights carry none, or in place of theirs",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="use the averaged weights of a ZeRO checkpoint of a run with engine.ema",
    )
    parser.add_argument(
        "--port", type=command_line.count, default=7860, help="0 takes any (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets all see the page who reach this machine (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.port > 65535:
        parser.error(f"--port {args.port} is above 65535")

    from pathlib import Path

    with stage("loading mmseg and gradio"):
        from internseg_ds.evaluation.segmenter import Segmenter
        from internseg_ds.evaluation.viewer.page import application, check_gradio
        from internseg_ds.evaluation.viewer.server import address_of, listening, server_of

        check_gradio()
    with listening(args.host, args.port) as bound:
        segmenter = Segmenter.from_pretrained(args.checkpoint, config=args.config, ema=args.ema)
        server = server_of(application(segmenter, Path(args.checkpoint).resolve().name))
        print(f"{address_of(bound)} shows it; Ctrl-C ends it", flush=True)
        server.run(sockets=[bound])


def main() -> NoReturn:
    """The command."""
    command_line.run(_main)


if __name__ == "__main__":
    main()
