"""Several runs beside each other: their figures, their curves over each other, their classes."""

from collections.abc import Sequence
from dataclasses import dataclass

from internseg_ds.monitoring.units import SCORE, is_percent
from internseg_ds.run_report.chart import Axes, Chart, Line, chart
from internseg_ds.run_report.class_scores import class_rows
from internseg_ds.run_report.curves import smoothed
from internseg_ds.run_report.records import RunRecords
from internseg_ds.run_report.summary import figures, status

COMPARED = ("loss", "grad_norm", "lr", "images_per_s", "mfu", "data_wait", "peak_gib")
"""Metrics of steps that are drawn over each other."""
AS_RECORDED = ("lr", "peak_gib")
"""Those that are drawn without an average."""


@dataclass(frozen=True)
class Compared:
    """A run in the table. figures: text by name."""

    name: str
    status: str
    figures: dict[str, str]
    environment: Sequence[str]

    @classmethod
    def of(cls, run: RunRecords, name: str) -> "Compared":
        texts = {each.name: each.text for each in figures(run)}
        for each in figures(run):
            if each.name.startswith("best "):
                texts[each.name] = f"{each.text} ({each.more})"
        return cls(name, status(run), texts, run.starts[-1].environment if run.starts else ())


def named_apart(runs: Sequence[RunRecords]) -> list[str]:
    """The names of their folders, with as much of the path as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    most = max(len(path.parts) for path in paths)
    for count in range(1, most + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({place})" for place, path in enumerate(paths, 1)]  # one folder, named twice


def comparing_charts(runs: Sequence[RunRecords], names: Sequence[str]) -> list[Chart]:
    """A chart for each metric, with a line for each run."""
    scores = dict.fromkeys(name for run in runs for name in run.metrics.of if SCORE.fullmatch(name))
    drawn = []
    for metric in ("loss", *scores, *COMPARED[1:]):
        is_score = metric in scores
        lines = [
            Line(
                name,
                run.metrics.get(metric)
                if is_score or metric in AS_RECORDED
                else smoothed(run.metrics.get(metric)),
                dots=is_score,
            )
            for run, name in zip(runs, names, strict=True)
        ]
        axes = Axes(metric, "%" if is_percent(metric) else "", may_be_logarithmic=metric == "grad_norm")
        drawn.append(chart(axes, lines))
    return [each for each in drawn if each is not None]


def class_table(runs: Sequence[RunRecords]) -> list[tuple[str, list[float | None], float | None]]:
    """Of each class the newest score in each run, and how far these are apart; those furthest apart first."""
    of_runs = [{row.name: row.newest for row in class_rows(run)} for run in runs]
    rows = []
    for name in dict.fromkeys(name for scores in of_runs for name in scores):
        values = [scores.get(name) for scores in of_runs]
        there = [value for value in values if value is not None]
        rows.append((name, values, max(there) - min(there) if len(there) > 1 else None))
    return sorted(rows, key=lambda row: -(row[2] if row[2] is not None else -1.0))
