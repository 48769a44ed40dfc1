"""What a host does to a run, as one error message: processes that it kills, files and shared memory that it does
not give.

In: what torch and the operating system raise, on one rank, at any moment. Out: `Lost`, where starting the run
again may help, `HostError`, where the host's settings must change first.
"""

import errno
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from internseg_ds.errors import HostError, Lost

DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)\.|exited unexpectedly)"
)
NO_SHARED_MEMORY = re.compile(r"</torch_\w+>: (?:No space left on device|Cannot allocate memory)")
TOO_MANY_FILES = "Too many open files"
MORE_FILES = "raise `ulimit -n` (65536 is usual)"
MORE_SHARED_MEMORY = "make it larger (docker run --shm-size=16g)"


@contextmanager
def host_errors_explained() -> Iterator[None]:
    """Raises HostError or Lost in the place of what is known to mean that."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (meant := explained(error)) is error:
            raise
        raise meant from error


def explained(error: BaseException) -> BaseException:
    """The HostError or Lost that an error is known to mean; else the error itself."""
    return (_meaning(error) if isinstance(error, (OSError, RuntimeError)) else None) or error


def _of_a_semaphore(error: OSError | RuntimeError) -> bool:
    """Whether a lock that processes share found no room; those lie in /dev/shm, too, and name no file."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        getattr(error, "errno", None) == errno.ENOSPC
        and bool(frames)
        and frames[-1].filename.endswith("multiprocessing/synchronize.py")
    )


def _meaning(error: OSError | RuntimeError) -> HostError | Lost | None:
    text, host = str(error), socket.gethostname()
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or TOO_MANY_FILES in text:
        return HostError(
            f"host {host} allows a process no more open files; {MORE_FILES}, or lower data.workers_per_gpu"
        )
    dead = DEAD_WORKER.search(text)
    if (
        NO_SHARED_MEMORY.search(text)
        or _of_a_semaphore(error)
        or (dead is not None and dead[2] == "Bus error")
    ):
        return HostError(
            f"/dev/shm of host {host} is full, through which data workers hand over their images; "
            f"{MORE_SHARED_MEMORY}, or lower data.workers_per_gpu or data.samples_per_gpu"
        )
    if dead is not None:
        how = f"was killed by a signal ({dead[2]})" if dead[2] else "ended without a word"
        return Lost(
            f"data worker {dead[1]} of host {host} {how}: where memory is short, "
            "the kernel does that (dmesg tells); lower data.workers_per_gpu, or start again with --resume "
            "auto"
        )
    return None
