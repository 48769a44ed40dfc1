"""Runs a training command again when it ends in a way that starting it again can cure.

In: a command line that trains (deepspeed, mpirun, ssh ... launch/train.py CONFIG ...). Out: the exit code of
its last run. It sees processes, exit codes and WORK_DIR/checkpoints/latest; what a checkpoint is, it does not
know.
"""

import ctypes
import logging
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from internseg_ds.config.packaged import CONFIGS, find
from internseg_ds.errors import ConfigError
from internseg_ds.exit_codes import FAILED, LOST
from internseg_ds.training.stop_requests import SAME_REQUEST_S

log = logging.getLogger(__name__)

SIGNALLED = 128
"""From here on exit codes are signals, which shells and mpirun report as 128 + n and deepspeed as 256 - n,
and ssh's 255."""
LONGEST_DELAY_S = 300.0
AGAIN_S = SAME_REQUEST_S + 1
"""Requests closer together are one. Longer than for the training, to which they come later."""
PATIENCE_S = 60.0
"""For processes that an ended command left behind; then they are killed."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
COMMANDS = ("internseg-train", "internseg_ds.cli.train")
"""What trains without a script: the installed command, and the module of --module or -m."""
RESUME = ("--resume", "--resume-from", "--auto-resume")
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def can_be_mended(code: int) -> bool:
    """Whether another start may end better. Not after 0, a user's error (2), a diverged loss (3), a stop on
    request (75), or a command that does not exist (127)."""
    return code in (FAILED, LOST) or code >= SIGNALLED or code < 0


def work_dir_of(command: Sequence[str]) -> Path:
    """Where the command's run keeps its checkpoints: its --work-dir, or what train.py takes without one.
    Raises ConfigError when neither can be told."""
    for place, word in enumerate(command):
        if word == "--work-dir" and place + 1 < len(command):
            return Path(command[place + 1])
        if word.startswith("--work-dir="):
            return Path(word.partition("=")[2])
    # the script of a checkout, or the installed command, and behind it the config
    programs = [
        place for place, word in enumerate(command) if word.endswith(".py") or Path(word).name in COMMANDS
    ]
    configs = [
        config
        for word in (command[programs[0] + 1 :] if programs else ())
        if (config := find(word, CONFIGS)).suffix == ".py"
    ]
    if not configs:
        raise ConfigError(
            f"no --work-dir and no config can be found in: {shlex.join(command)}; "
            "name the script and the config, or give the script a --work-dir"
        )
    return _set_in_config(configs[0], command) or Path("work_dirs") / configs[0].stem


def _set_in_config(config: Path, command: Sequence[str]) -> Path | None:
    """The `work_dir` of a config, or of the options that override it; None where neither says."""
    for word in command:
        if word.startswith("work_dir="):
            return Path(word.partition("=")[2])
    from internseg_ds.config.config_file import executed  # here: it takes seconds

    try:
        named = executed(config).get("work_dir")
    except ConfigError:  # which train.py says
        return None
    return Path(named) if isinstance(named, str) and named else None


def resuming(command: Sequence[str], *, saved: bool) -> list[str]:
    """The command that goes on from the newest checkpoint of its work directory.

    A checkpoint that the command itself names stays until the run has `saved` one of its own.
    """
    named = any(word.partition("=")[0] in RESUME for word in command)
    if named and not saved:
        return list(command)
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word in RESUME[:2]:
            next(words, None)
        elif word.partition("=")[0] not in RESUME:
            kept.append(word)
    return [*kept, "--resume", "auto"]


class KeptRunning:
    """A command, and the processes that it starts.

    SIGTERM, SIGINT and SIGUSR1 ask it to end, and it is not started again. The training processes among its
    own get SIGUSR1, and so save; where there are none (yet, or on this host), all get the signal itself. A
    second request is Ctrl-C for the training processes, which ends them at once, and SIGTERM for the rest.
    """

    def __init__(self, command: Sequence[str], *, max_restarts: int, delay_s: float) -> None:
        """max_restarts: in a row without a new checkpoint. delay_s: before the first restart in a row; it
        doubles with each, up to LONGEST_DELAY_S."""
        self.command, self.max_restarts, self.delay_s = command, max_restarts, delay_s
        self.pointer = work_dir_of(command) / "checkpoints" / "latest"
        self._asked = False
        self._signal, self._again, self._asked_at = signal.SIGTERM, False, -AGAIN_S

    def run(self) -> int:
        """Runs it until it is done, ends for a reason that a restart cannot cure, or was asked to end. Returns
        its last exit code, 128 + n for signal n. For the main thread."""
        # what a killed launcher leaves behind becomes our child, and can be found
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        for number in SIGNALS:
            signal.signal(number, self._request)
        restarts, first = 0, self._newest()
        while True:
            before = self._newest()
            code = self._once(resuming(self.command, saved=before != first))
            if self._asked or not can_be_mended(code):
                break
            if self._newest() != before:
                restarts = 0
            if restarts >= self.max_restarts:
                log.error(
                    "it ended with code %d; no restart is left, %d in a row brought no new checkpoint",
                    code,
                    restarts,
                )
                break
            delay_s = min(self.delay_s * 2 ** min(restarts, 30), LONGEST_DELAY_S)
            restarts += 1
            log.warning(
                "it ended with code %d; restart %d of %d in %.0f s",
                code,
                restarts,
                self.max_restarts,
                delay_s,
            )
            until = time.monotonic() + delay_s
            while not self._asked and time.monotonic() < until:
                time.sleep(0.1)
            if self._asked:
                break
        return code if code >= 0 else SIGNALLED - code

    def _once(self, command: list[str]) -> int:
        log.info("starting %s", shlex.join(command))
        try:
            # a terminal's Ctrl-C shall come to us alone
            child = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be started: {error.strerror}; is it installed, and in PATH?"
            ) from error
        if self._asked:
            self._pass_on()
        code = child.wait()
        log.info("ended with code %d", code)
        left = _descendants()
        if code == 0 and any(map(_saves_on_request, left)):
            # deepspeed 0.19 says 0 when its own launch.py is killed
            log.warning("its training goes on without it, so it did not end well")
            code = FAILED
        _, left = psutil.wait_procs(left, timeout=PATIENCE_S)
        for process in left:
            log.warning("killing process %d, which it left behind", process.pid)
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left)
        return code

    def _newest(self) -> tuple[str, int] | None:
        """Changes whenever the run publishes a checkpoint."""
        try:
            return self.pointer.read_text(), self.pointer.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._asked_at < AGAIN_S:
            return
        self._asked_at = time.monotonic()
        self._signal = signal.SIGTERM if self._asked else signal.Signals(number)
        self._again = self._asked
        self._asked = True
        log.info("got %s; there will be no restart", signal.Signals(number).name)
        self._pass_on()

    def _pass_on(self) -> None:
        everybody = _descendants()
        training = set(filter(_saves_on_request, everybody))
        for process in everybody if self._again else training or everybody:
            number = (
                self._signal if process not in training else signal.SIGINT if self._again else signal.SIGUSR1
            )
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _saves_on_request(process: psutil.Process) -> bool:
    """Whether it catches SIGUSR1, as a training process does (deepspeed and torchrun do not)."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    except OSError:  # it has ended
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)
