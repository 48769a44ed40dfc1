"""Where a run's metrics are always logged: the console and WORK_DIR/metrics.jsonl (`trackers` are what a config
asks for beside them); and the log itself, WORK_DIR/train.log.

In: flat dicts of floats with a step. Rank 0 writes; on other ranks `open_loggers` gives an empty list. Nothing
here is collective.
"""

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Protocol

from internseg_ds.monitoring.buffered_lines import BufferedLines
from internseg_ds.output_files import whole_file

log = logging.getLogger(__name__)

SHARES = ("mfu", "hfu", "data_wait", "waits_for_slowest")
"""Metrics that the console shows in percent, as it does scores; in all files they are fractions."""
SCORE = re.compile(r"(?:\d+_)?(?:aAcc|m[A-Z]\w*)")
"""mmseg's names of scores of all classes together; of several data sets, with the number of theirs."""
SCORE_OF_A_CLASS = re.compile(r"(?:\d+_)?[A-Z]\w*\..*")
"""mmseg's names of scores of one class, such as IoU.wall, which the console leaves out."""
EARLY_LINES = 1000
"""Lines of the log that are kept for a work directory that is not there yet."""


class MetricLogger(Protocol):
    """Writes records: the metrics of one step, by their names."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """May raise OSError, after which the record is written with the next one."""

    def close(self) -> None:
        """Writes what waits. May raise OSError."""


class ConsoleLogger:
    """One line per record: step, progress, the values, time left."""

    def __init__(self, max_steps: int, start: int) -> None:
        self.max_steps = max_steps
        self.start = start
        self.began = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        done = step - self.start
        left = (self.max_steps - step) * (time.monotonic() - self.began) / done if done else 0.0
        numbers = "  ".join(
            f"{name} {_readable(name, value)}"
            for name, value in values.items()
            if not SCORE_OF_A_CLASS.fullmatch(name)
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


def _readable(name: str, value: float) -> str:
    if SCORE.fullmatch(name):
        return f"{value:.2%}"
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


class JsonlLogger:
    """metrics.jsonl: one JSON object per record, flushed at once, appended to on resume. Records that a resumed
    run writes again are dropped first."""

    def __init__(self, path: Path, start: int, *, scores_again: bool = False) -> None:
        """start: the step that the run goes on from. scores_again: whether it evaluates at that step once
        more. Raises OutputError."""
        rewind(path, start, scores_again=scores_again)
        self.lines = BufferedLines(path)
        self.lines.add("")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON knows neither NaN nor infinity
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.lines.add(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def close(self) -> None:
        self.lines.add("")


def rewind(path: Path, start: int, *, scores_again: bool = False) -> None:
    """Keeps the records of a file of JSON lines up to step `start`, those that a resumed run does not write
    again; none where it starts at 0. Atomic.

    scores_again: the scores of that step are written again, too. Raises OutputError where there is no room
    for it.
    """
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines() if start > 0 else []
    kept = []
    for line in lines:
        step = _step_of(line)
        are_scores = step == start and "loss" not in json.loads(line)
        if step <= start and not (scores_again and are_scores):
            kept.append(line)
    with whole_file(path) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # half a line, from a run that was killed while it wrote


@contextmanager
def open_loggers(
    work_dir: Path,
    *,
    max_steps: int,
    start: int,
    is_main: bool,
    scores_again: bool = False,
) -> Iterator[list[MetricLogger]]:
    """The metric loggers of one run, closed at the end of the block however it ends. start: the step that it
    resumes from; scores_again: whether it evaluates at that step once more."""
    if not is_main:
        yield []
        return
    loggers: list[MetricLogger] = [
        ConsoleLogger(max_steps, start),
        JsonlLogger(work_dir / "metrics.jsonl", start, scores_again=scores_again),
    ]
    try:
        yield loggers
    finally:
        for logger in loggers:
            with suppress(OSError):  # of a full disk, which was warned of
                logger.close()


class LogFile(logging.Handler):
    """Appends the lines of a log to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.lines = BufferedLines(path)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.add(self.format(record) + "\n")


def start_logging(work_dir: Path | None, *, level: str, is_main: bool, header: Sequence[str] = ()) -> None:
    """Sends the log lines of this package on rank 0 to the console, and to WORK_DIR/train.log. level: of rank
    0 ("INFO"); other ranks log warnings only.

    header: what is logged first. A run calls this without a work directory at its start, when the folder may
    not be made yet; the file gets the lines since then.
    """
    package = logging.getLogger("internseg_ds")
    package.setLevel(level if is_main else logging.WARNING)
    package.propagate = False
    early = _taken_off(package)
    if not is_main:
        # all ranks build the same model: one logs what it found
        logging.getLogger("internseg_ds.models").setLevel(logging.ERROR)
    _add_handler(package, logging.StreamHandler())
    to_file: logging.Handler | None = None
    if is_main and work_dir is not None:
        to_file = LogFile(work_dir / "train.log")
        _add_handler(package, to_file)
    elif is_main:
        _add_handler(package, MemoryHandler(EARLY_LINES, flushLevel=logging.CRITICAL + 1))
    for line in header:
        log.info("%s", line)
    if to_file is not None:
        for record in early:
            to_file.handle(record)


def _taken_off(package: logging.Logger) -> list[logging.LogRecord]:
    """Takes off the handlers of a start before; the records that waited in memory."""
    early: list[logging.LogRecord] = []
    for handler in list(package.handlers):
        if isinstance(handler, MemoryHandler):
            early += handler.buffer
        package.removeHandler(handler)
        handler.close()
    return early


def _add_handler(package: logging.Logger, handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    package.addHandler(handler)
