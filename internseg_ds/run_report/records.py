"""What a run has left in its work directory, read once: the records of its steps and evaluations, its starts,
the steps that were skipped, its settings.

Nothing here complains: a file that is not there, a line that a killed run has not finished, is no record.
"""

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from internseg_ds.monitoring.evaluation_record import (
    FOLDER,
    EvaluationRecord,
    evaluation_files,
    read_evaluation,
)
from internseg_ds.monitoring.json_lines import read_json_lines
from internseg_ds.monitoring.run_starts import RunStart, read_starts
from internseg_ds.monitoring.units import todays

LINES = 1_000_000
"""Records that are read of a file at most; the page of a run with more of them lacks the rest."""


@dataclass(frozen=True)
class Series:
    """A metric over steps, in the order of steps. values: NaN where a record has none."""

    steps: np.ndarray
    """(n) float64."""
    values: np.ndarray
    """(n) float64."""

    @property
    def finite(self) -> "Series":
        """The records that have a value."""
        there = np.isfinite(self.values)
        return self if there.all() else Series(self.steps[there], self.values[there])

    @property
    def of_checkpoints(self) -> "Series":
        """Without what was measured before the first step."""
        trained = self.steps > 0
        return self if trained.all() else Series(self.steps[trained], self.values[trained])

    @property
    def last(self) -> tuple[int, float] | None:
        """Step and value of the newest record that has one."""
        there = self.finite
        return (int(there.steps[-1]), float(there.values[-1])) if len(there.steps) else None

    @property
    def highest(self) -> tuple[int, float] | None:
        """Step and value of the first record with the highest value."""
        there = self.finite
        if not len(there.steps):
            return None
        place = int(there.values.argmax())
        return int(there.steps[place]), float(there.values[place])


@dataclass(frozen=True)
class Restart:
    """A run that was started again."""

    step: int
    """That it went on from."""
    time: float | None
    """Seconds since 1970, where that is known."""
    repeated: int
    """Records of later steps that the file still had, which this run wrote again."""


@dataclass
class _Columns:
    """Metrics by name, as they are read."""

    by_name: dict[str, tuple[array, array]] = field(default_factory=dict)
    highest: float = -1.0
    """The last step."""

    def add(self, step: float, values: dict[str, Any]) -> None:
        self.highest = step
        for name, value in values.items():
            number = _number(value)
            steps, numbers = self.by_name.setdefault(name, (array("d"), array("d")))
            steps.append(step)
            numbers.append(number)

    def goes_back(self, step: float, values: dict[str, Any]) -> bool:
        """Whether a record is of a run that began again before the last one."""
        losses, _ = self.by_name.get("loss", ((), ()))
        return step < self.highest or bool("loss" in values and losses and step == losses[-1])

    def drop_behind(self, step: float) -> int:
        """Takes away what is of later steps; how many records those were."""
        dropped = 0
        for steps, numbers in self.by_name.values():
            kept = len(steps)
            while kept and steps[kept - 1] > step:
                kept -= 1
            dropped = max(dropped, len(steps) - kept)
            del steps[kept:], numbers[kept:]
        return dropped


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl, in the units of `monitoring.units`. `of` has the metrics by name, with "time" (seconds since
    1970) among them."""

    of: dict[str, Series]
    scores: frozenset[str]
    """The names of those that an evaluation wrote."""
    restarts: list[Restart]

    def get(self, name: str) -> Series:
        return self.of.get(name, Series(np.empty(0), np.empty(0)))


def read_metrics(path: Path) -> Metrics:
    """The records of a run. Those of a step that a later line begins again from are replaced by it."""
    columns, scores = _Columns(), set[str]()
    restarts: list[Restart] = []
    for line in read_json_lines(path, LINES):
        record = todays(line)
        step = _number(record.pop("step", None))
        if not math.isfinite(step):
            continue
        if columns.goes_back(step, record):
            repeated = columns.drop_behind(step - 1 if "loss" in record else step)
            moment = _number(record.get("time"))
            restarts.append(
                Restart(_before(columns, step), moment if math.isfinite(moment) else None, repeated)
            )
        if "loss" not in record:
            scores |= record.keys()
        columns.add(step, record)
    of = {
        name: Series(np.frombuffer(steps), np.frombuffer(values))
        for name, (steps, values) in columns.by_name.items()
        if len(steps)
    }
    return Metrics(of, frozenset(scores - {"time"}), restarts)


def _number(value: Any) -> float:
    """NaN for what is none, or too large for one."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _before(columns: _Columns, step: float) -> int:
    """The last step before `step` that has a record."""
    steps, _ = columns.by_name.get("loss", (array("d"), array("d")))
    return int(steps[-1]) if steps else max(0, int(step) - 1)


@dataclass(frozen=True)
class RunRecords:
    """All that a page is made of."""

    folder: Path
    metrics: Metrics
    starts: list[RunStart]
    evaluations: list[EvaluationRecord]
    """The first, the last and some between them, in the order of steps."""
    skipped: list[dict[str, Any]]
    """Lines of skipped_steps.jsonl: step, and of each rank the losses with their images."""
    faults: list[str]
    """Lines of data_faults.txt."""
    config: str
    ds_config: str

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step that has a record."""
        last = self.metrics.get("time").last
        return 0 if last is None else last[0]

    @property
    def max_steps(self) -> int | None:
        return self.starts[-1].max_steps if self.starts else None

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.max_steps is not None and self.step >= self.max_steps

    @property
    def restarts(self) -> list[Restart]:
        """In the order of time."""
        noted = [Restart(start.step, start.time, 0) for start in self.starts[1:]]
        steps = {restart.step for restart in noted}
        others = [restart for restart in self.metrics.restarts if restart.step not in steps]
        return sorted([*noted, *others], key=lambda restart: restart.time or 0.0)


PICTURED = 4
"""Evaluations whose pictures are read: the first, the last, and some between them."""


def read_run(folder: Path) -> RunRecords:
    """Reads a work directory."""
    files = evaluation_files(folder / FOLDER)
    places = {round(place) for place in np.linspace(0, len(files) - 1, min(PICTURED, len(files)))}
    evaluations: list[EvaluationRecord] = []
    for place, file in enumerate(files.values()):
        if place not in places:
            continue
        try:
            evaluations.append(read_evaluation(file))
        except ValueError:
            continue
    return RunRecords(
        folder,
        read_metrics(folder / "metrics.jsonl"),
        read_starts(folder),
        evaluations,
        list(read_json_lines(folder / "skipped_steps.jsonl", LINES)),
        _text(folder / "data_faults.txt").splitlines(),
        _text(folder / "config.py"),
        _text(folder / "ds_config.json"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
