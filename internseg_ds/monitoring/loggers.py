"""Where a run's metrics are always logged: the console and WORK_DIR/metrics.jsonl (`trackers` are what a config
asks for beside them).

In: flat dicts of floats with a step, in the units of `units`. Rank 0 writes; on other ranks `open_loggers` gives
an empty list. Nothing here is collective.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from internseg_ds.monitoring.buffered_lines import BufferedLines
from internseg_ds.monitoring.json_lines import json_object
from internseg_ds.monitoring.units import SCORE, SCORE_OF_A_CLASS, VERSION, is_percent, todays
from internseg_ds.output_files import whole_file

log = logging.getLogger(__name__)

SHOWN = (
    "loss",
    "lr",
    "grad_norm",
    "images_per_s",
    "mfu",
    "peak_gib",
    "data_wait",
    "waits_for_slowest",
    "loss_spikes",
    "skipped_steps",
)
"""Metrics of steps that the console has, in their order."""
WAITS = ("data_wait", "waits_for_slowest")
LONG_WAIT = 5.0
"""Percent of the time from which waiting is shown."""
COUNTS = ("loss_spikes", "skipped_steps")


class MetricLogger(Protocol):
    """Writes records: the metrics of one step, by their names."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """May raise OSError, after which the record is written with the next one."""

    def close(self) -> None:
        """Writes what waits. May raise OSError."""


class ConsoleLogger:
    """One line per record of steps: step, loss, learning rate, gradient norm, how fast, the last score and the best
    one, time left. Whatever else a record has is left to the other loggers, unless the log's level is DEBUG.

    Scores have lines of their own (`training.trainer`); they are only remembered here, also those of earlier starts.
    The best one is of a checkpoint, as everywhere: the score before the first step is none of them.
    """

    def __init__(self, max_steps: int, start: int) -> None:
        self.max_steps = max_steps
        self.start = start
        self.began = time.monotonic()
        self._score: tuple[str, float] | None = None
        self._best: float | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" not in values:
            self._remember(step, values)
            return
        everything = log.isEnabledFor(logging.DEBUG)
        shown = [name for name in SHOWN if name in values and _is_worth_a_word(name, values[name])]
        others = [name for name in values if name not in shown] if everything else []
        words = [f"{name} {readable(name, values[name])}" for name in (*shown, *others)]
        if self._score is not None:
            name, last = self._score
            best = "before training" if self._best is None else f"best {readable(name, self._best)}"
            words.append(f"{name} {readable(name, last)} ({best})")
        done = step - self.start
        left = (self.max_steps - step) * (time.monotonic() - self.began) / done if done else 0.0
        log.info(
            "step %*d/%d  %s  eta %s",
            len(str(self.max_steps)),
            step,
            self.max_steps,
            "  ".join(words),
            timedelta(seconds=round(left)),
        )

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        """The first score of a record is the one that a run is known by."""
        name = next((name for name in values if SCORE.fullmatch(name) and name.startswith("m")), None)
        if name is None or values[name] is None:
            return
        self._score = name, values[name]
        if step > 0:
            self._best = values[name] if self._best is None else max(self._best, values[name])

    def close(self) -> None:
        pass


def _is_worth_a_word(name: str, value: float) -> bool:
    """Waiting is, where it takes more than a little of the time, and so are steps that went wrong."""
    if name in WAITS:
        return value >= LONG_WAIT
    return name not in COUNTS or value > 0


def readable(name: str, value: float) -> str:
    """The value of a record, for a person."""
    if is_percent(name):
        return (
            f"{value:.2f} %"
            if SCORE.fullmatch(name) or SCORE_OF_A_CLASS.fullmatch(name)
            else f"{value:.1f} %"
        )
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


class JsonlLogger:
    """metrics.jsonl: one JSON object per record, flushed at once, appended to on resume. Records that a resumed
    run writes again are dropped first."""

    def __init__(self, path: Path, start: int, *, scores_again: bool = False) -> None:
        """start: the step that the run goes on from. scores_again: whether it evaluates at that step once
        more. Raises OutputError."""
        kept = rewind(path, start, scores_again=scores_again, todays_units=True)
        self.earlier_scores = [record for record in kept if "loss" not in record]
        """The records of evaluations of earlier starts."""
        self.lines = BufferedLines(path)
        self.lines.add("")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON knows neither NaN nor infinity
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.lines.add(json.dumps({"v": VERSION, "step": step, "time": time.time(), **finite}) + "\n")

    def close(self) -> None:
        self.lines.add("")


def rewind(
    path: Path, start: int, *, scores_again: bool = False, todays_units: bool = False
) -> list[dict[str, Any]]:
    """Keeps the records of a file of JSON lines up to step `start`, those that a resumed run does not write
    again; none where it starts at 0. Gives them. Atomic.

    scores_again: the scores of that step are written again, too. todays_units: records in earlier units are
    converted. Raises OutputError where there is no room for it.
    """
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines() if start > 0 else []
    kept: list[tuple[str, dict[str, Any]]] = []
    for line in lines:
        record = json_object(line) or {}
        step = record.get("step")
        if not isinstance(step, (int, float)) or step > start:
            continue
        if scores_again and step == start and "loss" not in record:
            continue
        if todays_units and record.get("v") != VERSION:
            record = {"v": VERSION, **todays(record)}
            line = json.dumps(record)
        kept.append((line, record))
    with whole_file(path) as file:
        file.write("".join(f"{line}\n" for line, _ in kept).encode())
    return [record for _, record in kept]


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
    jsonl = JsonlLogger(work_dir / "metrics.jsonl", start, scores_again=scores_again)
    console = ConsoleLogger(max_steps, start)
    for record in jsonl.earlier_scores:
        console.write(record["step"], record)
    loggers: list[MetricLogger] = [console, jsonl]
    try:
        yield loggers
    finally:
        for logger in loggers:
            with suppress(OSError):  # of a full disk, which was warned of
                logger.close()
