"""What the commands share: running a `main`, its exit codes, and the options that all of them have.

Exit codes are in `exit_codes`. A user's error is one message on stderr, from rank 0, or from the one rank
that knows of it.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import internseg_ds
from internseg_ds import exit_codes
from internseg_ds.distributed.process_group import leave, world_from_environment
from internseg_ds.errors import OF_ONE_RANK, ConfigError, Diverged, Lost, UserError
from internseg_ds.host_faults import host_errors_explained
from internseg_ds.monitoring.run_log import begin_log

GRACE_S = 15
"""Seconds that ranks other than 0 wait before they exit on a user's error: launchers kill the others at the
first exit, and rank 0 is to speak first."""


def run(main: Callable[[], None]) -> NoReturn:
    """Calls `main` with its log begun, and exits with its code; leaves the process group on every path."""
    begin_log()
    code = exit_codes.FAILED
    try:
        with host_errors_explained():
            main()
        code = 0
    except UserError as error:
        code = exit_codes.USER_ERROR
        if _rank() == 0 or isinstance(error, OF_ONE_RANK):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(GRACE_S)
    except KeyboardInterrupt:
        code = exit_codes.INTERRUPTED
    except Lost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = exit_codes.LOST
    except Diverged as error:
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = exit_codes.DIVERGED
    finally:
        leave()
    sys.exit(code)


def given(text: str) -> str:
    """The type of an option that names something: an empty word, as of a variable that is not set, is an
    error and not "no such option"."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; is a variable not set?")
    return text


def _rank() -> int:
    try:
        return world_from_environment().rank
    except UserError:
        return int(os.environ.get("LOCAL_RANK", 0)) if os.environ.get("LOCAL_RANK", "0").isdigit() else 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong without all the options before it, once for all ranks."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose --help ends with a command that works, with the options that every script
    has."""
    made = Parser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # the deepspeed launcher passes it; LOCAL_RANK says the same
    made.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    made.add_argument("--version", action="version", version=f"internseg_ds {internseg_ds.__version__}")
    return made


def count(text: str) -> int:
    """The type of an option that counts things: a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def add_config(made: argparse.ArgumentParser) -> None:
    """The config, first of what stands without a name."""
    made.add_argument(
        "config",
        help="experiment config (MMSegmentation 0.x format): a path, or the name of one that comes with this "
        "package, such as timm_tiny/upernet_dinov3_tiny_112_ade20k",
    )


def add_checksum_option(made: argparse.ArgumentParser) -> None:
    """--skip-checksums, of what reads checkpoints or weights."""
    made.add_argument(
        "--skip-checksums",
        action="store_true",
        help="read checkpoints and weights without holding them against their checksums "
        "(engine.checksums=False)",
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the config."""
    return args.cfg_options | ({"engine.checksums": False} if args.skip_checksums else {})


def add_config_options(made: argparse.ArgumentParser) -> None:
    """--cfg-options, as mmseg's tools have it."""
    from mmcv import DictAction  # here: it takes a second, and its announcements go to the log that has begun

    class Settings(DictAction):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: list[str],
            option_string: str | None = None,
        ) -> None:
            for value in values:
                if "=" not in value:
                    parser.error(f"--cfg-options {value}: write KEY=VALUE")
            try:
                super().__call__(parser, namespace, values, option_string)
            except RecursionError:  # mmcv's reader of lists and tuples, of what is neither
                parser.error(
                    f"--cfg-options {' '.join(values)}: a dict(...) with a list cannot be written here; write "
                    "KEY.SUBKEY=VALUE for each setting, or put it into a config file"
                )
            except AssertionError as error:  # the same, of brackets without their fellow
                parser.error(f"--cfg-options {' '.join(values)}: {error}")

    made.add_argument(
        "--cfg-options",
        nargs="+",
        action=Settings,
        metavar="KEY=VALUE",
        default={},
        help="settings that override the config, e.g. data.samples_per_gpu=4 optimizer.lr=1e-4",
    )
