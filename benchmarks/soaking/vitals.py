"""Memory, open files, threads and shared memory of a run, looked at every few seconds."""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from soaking.attempt import Attempt

EVERY_S = 5.0
SHM = Path("/dev/shm")


class Vitals:
    """Appends a line to `file` for each look, from a thread. attempt: gives the one that runs now."""

    def __init__(self, file: Path, attempt: Callable[[], Attempt | None]) -> None:
        self.file, self.attempt, self.began = file, attempt, time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look_on, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.over.set()
        self.thread.join()

    def _look_on(self) -> None:
        while not self.over.wait(EVERY_S):
            attempt = self.attempt()
            if attempt is not None and (seen := look(attempt)) is not None:
                with self.file.open("a") as file:
                    file.write(
                        json.dumps({"seconds": round(time.monotonic() - self.began, 1), **seen}) + "\n"
                    )


def look(attempt: Attempt) -> dict[str, float] | None:
    """Of a training that has begun: private MiB, open files and threads of the largest rank, MiB of /dev/shm,
    files in the work directory."""
    step, ranks = attempt.step(), []
    with suppress(psutil.Error, OSError):
        ranks = [
            (rank.memory_full_info().uss / 2**20, rank.num_fds(), rank.num_threads())
            for rank in attempt.ranks()
        ]
    if step is None or not ranks:
        return None
    mib, files, threads = (max(values) for values in zip(*ranks, strict=True))
    return {
        "step": step,
        "rank_mib": round(mib, 1),
        "rank_files": files,
        "rank_threads": threads,
        "shm_mib": round(shm_bytes() / 2**20, 2),
        "work_dir_files": sum(len(files) for _, _, files in os.walk(attempt.work_dir)),
    }


def shm_bytes() -> int:
    total = 0
    for path in SHM.iterdir():
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total
