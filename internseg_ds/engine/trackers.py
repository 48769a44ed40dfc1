"""Where a run's numbers go: the console, WORK_DIR/metrics.jsonl, and TensorBoard and Weights & Biases where the config's `log_config.hooks` ask for them.

In: flat dicts of floats with a step. Rank 0 writes; on other ranks `open_trackers` gives a list of none. A tracker never talks to other ranks.
"""

import errno
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Protocol

from internseg_ds.engine.late_lines import LateLines
from internseg_ds.engine.outputs import whole_file
from internseg_ds.errors import ConfigError

log = logging.getLogger(__name__)

WANDB_HOOKS = ("WandbLoggerHook", "MMSegWandbHook")
SHARES = ("mfu", "hfu", "data_wait", "waits_for_slowest")
"""Values that the console shows in percent; everywhere else they are fractions."""
ROOM_FOR_EVENTS = 2**16
"""Bytes that must be free for a record of TensorBoard's."""
EARLY_LINES = 1000
"""Of the log, that wait for the run's work directory, if it gets one."""


class Tracker(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class ConsoleTracker:
    """One line per record: step, progress, the values, time left."""

    def __init__(self, max_steps: int, start: int) -> None:
        self.max_steps, self.start, self.began = max_steps, start, time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        done = step - self.start
        left = (self.max_steps - step) * (time.monotonic() - self.began) / done if done else 0.0
        numbers = "  ".join(
            f"{name} {f'{value:.1%}' if name in SHARES else _readable(value)}"
            for name, value in values.items()
            if not name.startswith(("IoU.", "Acc."))
        )
        log.info(
            "step %*d/%d  %s  eta %s",
            len(str(self.max_steps)),
            step,
            self.max_steps,
            numbers,
            timedelta(seconds=round(left)),
        )

    def close(self) -> None:
        pass


def _readable(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


class JsonlTracker:
    """metrics.jsonl: one JSON object per record, flushed at once, appended to on resume. Records that are written again are dropped first."""

    def __init__(self, path: Path, start: int, *, scores_again: bool = False) -> None:
        """start: the step that the run goes on from. scores_again: whether it scores that step once more. Raises OutputError."""
        rewind(path, start, scores_again=scores_again)
        self.lines = LateLines(path)
        self.lines.add("")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }  # JSON knows neither NaN nor infinity
        self.lines.add(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def close(self) -> None:
        self.lines.add("")


def rewind(path: Path, start: int, *, scores_again: bool = False) -> None:
    """Leaves the records of a file of JSON lines up to step `start`, those that a resumed run does not write again; at once, or not at all.

    scores_again: the scores of that step are written again, too. Raises OutputError where there is no room for it.
    """
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()
        kept = [
            line
            for line in lines
            if 0 < start >= _step_of(line)
            and not (scores_again and _step_of(line) == start and "loss" not in json.loads(line))
        ]
        with whole_file(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # half a line, from a run that was killed while it wrote


class TensorBoardTracker:
    """Scalars in WORK_DIR/tensorboard. After a write that failed, what is not there yet goes into a new file with the next record."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._open, self._writer = lambda: SummaryWriter(str(folder)), None
        self._waiting: list[tuple[int, float, Mapping[str, float]]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Raises OSError where some records have to wait."""
        self._waiting.append((step, time.time(), dict(values)))
        self._catch_up()

    def close(self) -> None:
        if self._waiting:
            self._catch_up()
        if self._writer is not None:
            self._writer.close()

    def _catch_up(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < ROOM_FOR_EVENTS:
                raise OSError(
                    errno.ENOSPC, os.strerror(errno.ENOSPC)
                )  # the writer's thread would print a traceback
            self._writer = self._writer or self._open()
            for step, moment, values in self._waiting:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step, moment)
            self._writer.flush()  # an error of its thread comes out here
        except OSError:
            self._writer = None  # after an error it would only repeat it
            raise
        self._waiting = []


class WandbTracker:
    """A Weights & Biases run; WANDB_MODE=offline keeps it in WORK_DIR/wandb and needs no account."""

    def __init__(self, folder: Path, init: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(**{"dir": str(folder), "config": dict(config), **init})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def check_trackers(hooks: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError when a wandb hook cannot work: wandb is not installed, or would ask for an account that it does not know."""
    for hook in hooks:
        if hook["type"] not in WANDB_HOOKS:
            continue
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "log_config.hooks names a wandb hook, but wandb is not installed; pip install wandb, or drop the hook"
            ) from None
        mode = (hook.get("init_kwargs") or {}).get("mode") or os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.api.api_key:
            raise ConfigError(
                "log_config.hooks names a wandb hook, but wandb knows no account here; run `wandb login`, or set WANDB_MODE=offline"
            )


@contextmanager
def open_trackers(
    work_dir: Path,
    hooks: Sequence[Mapping[str, Any]],
    *,
    max_steps: int,
    start: int,
    config: Mapping[str, Any],
    is_main: bool,
    scores_again: bool = False,
) -> Iterator[list[Tracker]]:
    """The trackers of one run, closed at the end of the block however it ends. start: the step that it resumes from; scores_again: whether it scores that
    step once more. config: what wandb shows as the run's configuration."""
    if not is_main:
        yield []
        return
    trackers: list[Tracker] = [
        ConsoleTracker(max_steps, start),
        JsonlTracker(work_dir / "metrics.jsonl", start, scores_again=scores_again),
    ]
    for hook in hooks:
        if hook["type"] == "TensorboardLoggerHook":
            trackers.append(TensorBoardTracker(Path(hook.get("log_dir") or work_dir / "tensorboard")))
        elif hook["type"] in WANDB_HOOKS:
            trackers.append(WandbTracker(work_dir, hook.get("init_kwargs") or {}, config))
    try:
        yield trackers
    finally:
        for tracker in trackers:
            with suppress(OSError):  # of a full disk, which was warned of
                tracker.close()


class LogFile(logging.Handler):
    """Adds the lines of a log to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.lines = LateLines(path)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.add(self.format(record) + "\n")


def start_logging(work_dir: Path | None, *, level: str, is_main: bool, header: Sequence[str] = ()) -> None:
    """Log lines of this package on rank 0: to the console, and to WORK_DIR/train.log. level: of rank 0 ("INFO"); other ranks log warnings only.

    header: what is logged first. A run calls this without a work directory at its start, when it may not be made yet; the file gets what was said since then.
    """
    package = logging.getLogger("internseg_ds")
    package.setLevel(level if is_main else logging.WARNING)
    package.propagate = False
    early = [
        record
        for handler in package.handlers
        if isinstance(handler, MemoryHandler)
        for record in handler.buffer
    ]
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    if not is_main:
        logging.getLogger("internseg_ds.models").setLevel(
            logging.ERROR
        )  # all ranks build the same model: one says what it found
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if is_main:
        handlers.append(
            LogFile(work_dir / "train.log")
            if work_dir is not None
            else MemoryHandler(EARLY_LINES, flushLevel=logging.CRITICAL + 1)
        )
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        package.addHandler(handler)
    for line in header:
        log.info("%s", line)
    if work_dir is not None and is_main:
        for record in early:
            handlers[-1].handle(record)
