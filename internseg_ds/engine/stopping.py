"""Requests that a training save and stop: SIGTERM and SIGUSR1 (Slurm's warning) to any rank, a file WORK_DIR/STOP, and the end of its launcher.

Each is only noted here; ranks agree on it at the end of a step (`trainer.train`), and hear of each other's sooner through the watch.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from internseg_ds.errors import ConfigError
from internseg_ds.exit_codes import STOPPED

if TYPE_CHECKING:
    from internseg_ds.distributed.watch import Watch  # which loads torch, and the first signal may come before that
    from internseg_ds.engine.launcher import Launcher

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_S = 2.0
"""Signals so close together are one request: a launcher passes on what its processes were sent, too."""
LOOK_S = 1.0
"""Seconds between looks for the file, which may lie on a slow file system, and for the launcher."""


def stop_file(work_dir: Path) -> Path:
    return work_dir / "STOP"


def check_no_stop_file(work_dir: Path) -> None:
    """Raises ConfigError when a run would stop at its first step."""
    if (file := stop_file(work_dir)).exists():
        raise ConfigError(f"{file} is there, which tells a training to stop; remove it to train")


def exit_on_request() -> None:
    """Until a training watches for requests itself, each ends the process at once, with the code of a run that may be started again: nothing is lost yet."""
    _listen(lambda _: os._exit(STOPPED))


def _listen(hear: Callable[[int], None]) -> Callable[[], None]:
    """Calls `hear` with each of SIGNALS, in a thread: the main one may be in a collective that never returns. Returns what ends that. For the main thread."""
    arriving, written = socket.socketpair()
    written.setblocking(False)
    written_before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    handlers_before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}

    def take(arriving: socket.socket, _: socket.socket) -> None:  # which closes when nobody holds it
        with arriving:
            while numbers := arriving.recv(64):
                for number in set(numbers) & set(SIGNALS):
                    hear(number)

    def end() -> None:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(written_before)
        written.close()  # and the thread ends

    threading.Thread(target=take, args=(arriving, written), daemon=True, name="signals").start()
    return end


def exit_stopped() -> NoReturn:
    """Ends a run that saved and stopped with its code; a launcher that ends it for having ended changes nothing about that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(STOPPED)


class StopRequests:
    """What was asked of this rank. Between `listen` and `close` signals are noted; a second one ends the process at once, and nothing that was saved suffers
    from it."""

    def __init__(self, file: Path | None, watch: "Watch", launcher: "Launcher") -> None:
        """file: looked for, by the rank that is given it. watch: is told, and knows whether another rank was asked."""
        self.file, self.watch, self.launcher = file, watch, launcher
        self._first, self._looked = 0.0, 0.0
        self._unlisten: Callable[[], None] | None = None

    def listen(self) -> None:
        """From now on signals are noted. In a thread that is not the main one, they stay as they are."""
        if self._unlisten is None and threading.current_thread() is threading.main_thread():
            self._unlisten = _listen(self._note)

    def close(self, *, failed: bool = False) -> None:
        """Signals are what they were before; where the run failed, the system's default: nothing is saved any more, so nobody shall take the end for that."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
            for number in SIGNALS if failed else ():
                signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Whether some rank was asked, as far as this one knows."""
        if not self.watch.asked_to_stop and time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            if self.launcher.gone():
                log.warning("the launcher of this training has ended, so it stops, too")
                self.watch.ask_to_stop()
            elif self.file is not None and self.file.exists():
                self.watch.ask_to_stop()
        return self.watch.asked_to_stop

    def _note(self, number: int) -> None:
        if self._first and time.monotonic() - self._first > SAME_REQUEST_S:
            os._exit(128 + number)
        self._first = self._first or time.monotonic()
        self.watch.ask_to_stop()
