"""Starts a training again when it fails, for launchers that do not (deepspeed, mpirun, ssh)."""

import argparse
import logging
import sys

from internseg_ds import __version__
from internseg_ds.errors import UserError
from internseg_ds.exit_codes import USER_ERROR
from internseg_ds.training.keep_running import KeptRunning


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Runs COMMAND with --resume auto, and again when a crash, a signal or a lost rank ends "
        "it. "
        "SIGTERM, SIGINT and SIGUSR1 have it save and stop.",
        epilog="example:\n  python launch/keep_running.py --max-restarts 5 -- deepspeed --hostfile "
        "hostfile launch/train.py CONFIG --work-dir work_dirs/mine",
        # without `command_line`: what only waits beside a training loads no torch
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"internseg_ds {__version__}")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="in a row that bring no new checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--delay",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="before the first restart; it doubles with each that brings no new checkpoint, up to 5 "
        "minutes (default: %(default)s)",
    )
    parser.add_argument(
        "command", nargs="+", metavar="COMMAND", help="after --: a launcher, launch/train.py and its options"
    )
    args = parser.parse_args()
    if args.max_restarts < 0 or not 0 <= args.delay < float("inf"):
        parser.error("--max-restarts and --delay must be at least 0")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s keep_running: %(message)s")
    try:
        sys.exit(KeptRunning(args.command, max_restarts=args.max_restarts, delay_s=args.delay).run())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
