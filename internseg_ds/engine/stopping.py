"""Requests that a training save and stop: SIGTERM and SIGUSR1 (Slurm's warning) to any rank, and a file WORK_DIR/STOP.

A signal or the file is only noted here; ranks agree on it at the end of a step (`trainer.train`), and hear of each other's sooner through the watch.
"""

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from internseg_ds.distributed.watch import Watch
from internseg_ds.errors import ConfigError

STOPPED = 75
"""Exit code of a run that saved and stopped because it was asked to: sysexits' "try again later". Starting it again with --resume auto goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_S = 2.0
"""Signals so close together are one request: a launcher passes on what its processes were sent, too."""
LOOK_S = 1.0
"""Seconds between looks for the file, which may lie on a slow file system."""


def stop_file(work_dir: Path) -> Path:
    return work_dir / "STOP"


def check_no_stop_file(work_dir: Path) -> None:
    """Raises ConfigError when a run would stop at its first step."""
    if (file := stop_file(work_dir)).exists():
        raise ConfigError(f"{file} is there, which tells a training to stop; remove it to train")


def exit_on_request() -> None:
    """Until a training watches for requests itself, each ends the process at once, with the code of a run that may be started again: nothing is lost yet."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(STOPPED))


class StopRequests:
    """What was asked of this rank. Inside the block signals are noted; a second one ends the process at once, and nothing that was saved suffers from it.

    A thread takes the signals, since the main one may be in a collective that never returns. Where the training does not run in the main thread, signals
    stay as they are.
    """

    def __init__(self, file: Path | None, watch: Watch) -> None:
        """file: looked for, by the rank that is given it. watch: is told, and knows whether another rank was asked."""
        self.file, self.watch = file, watch
        self._first, self._looked = 0.0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            arriving, self._written = socket.socketpair()
            self._written.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._take, args=(arriving,), daemon=True, name="signals").start()
            self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            self._written.close()  # and the thread ends

    def __call__(self) -> bool:
        """Whether some rank was asked, as far as this one knows."""
        if self.file is not None and time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            if self.file.exists():
                self.watch.ask_to_stop()
        return self.watch.asked_to_stop

    def _take(self, arriving: socket.socket) -> None:
        with arriving:
            while numbers := arriving.recv(64):
                for number in set(numbers) & set(SIGNALS):
                    if self._first and time.monotonic() - self._first > SAME_REQUEST_S:
                        os._exit(128 + number)
                    self._first = self._first or time.monotonic()
                    self.watch.ask_to_stop()
