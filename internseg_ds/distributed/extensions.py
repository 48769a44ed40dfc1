"""DeepSpeed's C++ extensions (shared-memory collectives and CPU Adam), compiled by one process at a time before anybody needs them.

torch guards a build with a file named `lock`, which outlives a process that is killed while it compiles: every later run would wait for it, for ever and
without a word. A lock of the operating system goes with its process, so whoever holds ours may remove such a leftover.
"""

import fcntl
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

PATIENCE_S = 5
"""How long an extension may take to load until somebody says why: one that is there takes less than a second."""


def build_extension(name: str) -> None:
    """Builds (once per environment, half a minute to some) and loads the extension of a DeepSpeed op builder, "CPUAdamBuilder" say. Talks to no other rank.

    Whether torch compiles shows in the time it takes alone: it does so again where paths, flags or headers have changed.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import (
        _get_build_directory,
    )  # no public name says where extensions are built

    builder = get_accelerator().create_op_builder(name)
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder.parent / f"{builder.name}.flock").open("w") as file:
        with _said_when_slow(
            logging.INFO,
            "waiting for another process of this host, which compiles DeepSpeed's %s into %s",
            builder.name,
            folder,
        ):
            fcntl.flock(file, fcntl.LOCK_EX)
        if (folder / "lock").exists():
            log.warning("compiling %s anew: a run was killed while it compiled that", folder)
            shutil.rmtree(folder, ignore_errors=True)  # what it left may look newer than it is
        with (
            _said_when_slow(
                logging.WARNING,
                "compiling DeepSpeed's %s into %s, once per environment; this takes half a minute, and minutes where cores "
                "are busy",
                builder.name,
                folder,
            ),
            _own_programs_first(),
        ):
            builder.load(verbose=False)


@contextmanager
def _own_programs_first() -> Iterator[None]:
    """Inside, programs of this Python's environment are found first, whether it is activated or not: torch needs a ninja, and two versions of it take each
    other's builds for stale, so that each run would compile again."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _said_when_slow(level: int, message: str, *args: object) -> Iterator[None]:
    """Logs the message where the block takes longer than `PATIENCE_S`."""
    timer = threading.Timer(PATIENCE_S, log.log, (level, message, *args))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def forget_shared_buffer(rank: int) -> None:
    """Takes the name from the buffer (66 MiB in /dev/shm) of DeepSpeed's shared-memory collectives, once all ranks of the host have opened it.

    DeepSpeed never does, so each run would leave its ranks' buffers in memory until the machine restarts. Without a name they go with their processes, even
    with killed ones.
    """
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)
