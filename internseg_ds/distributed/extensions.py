"""DeepSpeed's C++ extensions (shared-memory collectives and CPU Adam), compiled by one process at a time
before they are needed.

torch guards a build with a file, which is left behind when a process is killed while it compiles: every later
run would wait for it for ever, and log nothing. A lock of the operating system ends with its process; so the
process that holds ours may remove such a file.
"""

import fcntl
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOBase
from pathlib import Path

from internseg_ds.distributed.zero_internals import shared_buffer_file
from internseg_ds.torch_internals import build_was_interrupted, extension_folder

log = logging.getLogger(__name__)

PATIENCE_S = 5
"""Seconds after which the log tells why an extension takes so long: loading a compiled one takes less than a
second."""


def build_extension(name: str) -> None:
    """Builds (once per environment, in half a minute or more) and loads the extension of a DeepSpeed op
    builder. Not collective.

    name: of the builder, "CPUAdamBuilder" for instance. That torch compiles is only visible in the time that
    it takes: it also compiles again when paths, flags or headers have changed.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    folder = extension_folder(builder.name)
    with (folder.parent / f"{builder.name}.flock").open("w") as file:
        with _logged_when_slow(
            logging.INFO,
            "waiting for another process of this host, which compiles DeepSpeed's %s into %s",
            builder.name,
            folder,
        ):
            fcntl.flock(file, fcntl.LOCK_EX)
        if build_was_interrupted(folder):  # for our lock is held
            log.warning("compiling %s anew: a run was killed while it compiled that", folder)
            shutil.rmtree(folder, ignore_errors=True)  # what it left may look newer than it is
        with (
            _logged_when_slow(
                logging.WARNING,
                "compiling DeepSpeed's %s into %s, once per environment; this takes half a minute, and "
                "minutes where cores are busy",
                builder.name,
                folder,
            ),
            _own_programs_first(),
        ):
            builder.load(verbose=False)


@contextmanager
def _own_programs_first() -> Iterator[None]:
    """Inside, programs of this Python's environment are found first, whether it is activated or not: torch
    runs ninja, and two versions of ninja regard each other's builds as outdated, so that each run would
    compile again."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _logged_when_slow(level: int, message: str, *args: object) -> Iterator[None]:
    """Logs the message if the block takes longer than `PATIENCE_S`."""
    timer = threading.Timer(PATIENCE_S, log.log, (level, message, *args))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class _ToLogger(TextIOBase):
    """A text file whose lines go to DeepSpeed's own logger."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logging.getLogger("DeepSpeed").warning("%s", line)
        return len(text)


@contextmanager
def prints_logged() -> Iterator[None]:
    """Inside, what Python code prints (DeepSpeed: that an extension is built, on each rank) goes to DeepSpeed's
    logger."""
    with redirect_stdout(_ToLogger()):
        yield


def forget_shared_buffer(rank: int) -> None:
    """Removes the name of this rank's buffer for DeepSpeed's shared-memory collectives (66 MiB in /dev/shm),
    once all ranks of the host have opened it.

    DeepSpeed never does, so each run would leave its buffers in memory until the machine restarts. Without a
    name they are freed when their processes end, also when they are killed.
    """
    shared_buffer_file(rank).unlink(missing_ok=True)
