"""Requests that a training save and stop: SIGTERM, SIGUSR1 (Slurm's warning) and SIGINT (Ctrl-C) to any rank,
a file WORK_DIR/STOP, and the end of its launcher.

Each is only noted here; ranks agree on it at the end of a step (`trainer.train`), and hear of each other's
sooner through the watch.

Launchers and schedulers pass a request on, one process after the other, and so a rank may get the same one
again at any time: deepspeed's launch.py sends SIGTERM to each after it has waited up to 30 seconds for the
one before. Only a person presses Ctrl-C twice. So SIGTERM and SIGUSR1 ask for a save as often as they like,
and what cannot wait for the save sends SIGKILL.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from internseg_ds.errors import ConfigError
from internseg_ds.exit_codes import INTERRUPTED, STOPPED

if TYPE_CHECKING:
    # which loads torch, and the first signal may come before that
    from internseg_ds.distributed.watchdog import Watchdog
    from internseg_ds.training.launcher import Launcher

log = logging.getLogger(__name__)

FROM_PROGRAMS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (*FROM_PROGRAMS, signal.SIGINT)
SAME_REQUEST_S = 5.0
"""Signals so close together are one request: torchrun passes on the Ctrl-C that its ranks got from the
terminal, too."""
LOOK_S = 1.0
"""Seconds between looks for the file, which may lie on a slow file system, and for the launcher."""


def stop_file(work_dir: Path) -> Path:
    return work_dir / "STOP"


def check_no_stop_file(work_dir: Path) -> None:
    """Raises ConfigError when a run would stop at its first step."""
    if (file := stop_file(work_dir)).exists():
        raise ConfigError(f"{file} is there, which tells a training to stop; remove it to train")


def exit_on_request() -> None:
    """Until a training watches for requests itself, each ends the process at once, with the code of a run
    that may be started again (of Ctrl-C for Ctrl-C): nothing is lost yet."""

    def leave(number: int) -> None:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, f"got {_name(number)} before training began; nothing is lost\n".encode())
        os._exit(_code_before_training(number))

    _listen(leave)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _code_before_training(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def _listen(hear: Callable[[int], None], numbers: Collection[int] = SIGNALS) -> Callable[[], None]:
    """Calls `hear` with each of these signals, in a thread: the main one may be in a collective that never
    returns. Returns what ends that. For the main thread. Where Ctrl-C is ignored, as of jobs in the
    background, it stays so."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        numbers = set(numbers) - {signal.SIGINT}
    arriving, written = socket.socketpair()
    written.setblocking(False)
    written_before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    handlers_before = {number: signal.signal(number, lambda *_: None) for number in numbers}

    def take(arriving: socket.socket, _: socket.socket) -> None:  # which closes when nobody holds it
        with arriving:
            while arrived := arriving.recv(64):
                # a byte for each: two may have come at once
                for number in [each for each in arrived if each in handlers_before]:
                    hear(number)

    def end() -> None:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(written_before)
        written.close()  # and the thread ends

    threading.Thread(target=take, args=(arriving, written), daemon=True, name="signals").start()
    return end


def exit_stopped() -> NoReturn:
    """Ends a run that saved and stopped with its code; a launcher that ends it for having ended changes
    nothing about that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(STOPPED)


class StopRequests:
    """What was asked of this rank. Between `listen` and `close` signals are noted; Ctrl-C after an earlier
    request ends the process at once, and nothing that was saved suffers from it."""

    def __init__(self, file: Path | None, watch: "Watchdog", launcher: "Launcher") -> None:
        """file: looked for, by the rank that is given it. watch: is told, and knows whether another rank was
        asked."""
        self.file, self.watch, self.launcher = file, watch, launcher
        self.reason = ""
        """Why this rank itself was asked to stop; empty when it was not."""
        self._training = False
        self._first, self._looked = 0.0, 0.0
        self._unlisten: Callable[[], None] | None = None

    def listen(self, *, training: bool) -> None:
        """From now on signals are noted, or, before the training, end this process, and the other ranks with
        its code. In a thread that is not the main one they stay as they are; before the training, Ctrl-C that
        raises KeyboardInterrupt (a notebook's) does, too."""
        if threading.current_thread() is threading.main_thread():
            self.close()
            self._training = training
            interrupts = not training and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            self._unlisten = _listen(self._note, FROM_PROGRAMS if interrupts else SIGNALS)

    def close(self, *, failed: bool = False) -> None:
        """Signals are what they were before; where the run failed, SIGTERM and SIGUSR1 the system's default:
        nothing is saved any more, so nobody shall take the end for that."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
            for number in FROM_PROGRAMS if failed else ():
                signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Whether some rank was asked, as far as this one knows."""
        if not self.watch.asked_to_stop and time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            if self.launcher.gone():
                self._ask("the launcher of this training has ended")
            elif self.file is not None and self.file.exists():
                self._ask(f"{self.file} is there")
        return self.watch.asked_to_stop

    def _ask(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.watch.ask_to_stop()

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if not self._training:
            log.info("got %s before training began; nothing is lost", _name(number))
            self.watch.announce(f"{_name(number)}, before training began", _code_before_training(number))
            os._exit(_code_before_training(number))
        if number == signal.SIGINT and self._first and now - self._first > SAME_REQUEST_S:
            os._exit(INTERRUPTED)
        self._ask(f"rank {self.watch.world.rank} got {_name(number)}")
        if not self._first:
            self._first = now
            log.info(
                "got %s: this run saves at the end of its step and stops; Ctrl-C after %.0f s ends it at "
                "once",
                _name(number),
                SAME_REQUEST_S,
            )
