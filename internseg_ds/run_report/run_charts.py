"""Which charts the page of a run has: of loss, learning rates, gradients, speed, memory, scores."""

from collections.abc import Iterator, Sequence

import numpy as np

from internseg_ds.monitoring.units import SCORE, SCORE_OF_A_CLASS, is_percent
from internseg_ds.run_report.chart import Axes, Chart, Line, Mark, chart
from internseg_ds.run_report.curves import smoothed
from internseg_ds.run_report.records import RunRecords, Series

MOST_MARKS = 200
"""Spikes and skipped steps that are marked at most: the highest ones, the last ones."""
FEW = 50
"""Records of which no average is drawn."""
UTILIZATION = ("mfu", "hfu")
WAITS = ("data_wait", "waits_for_slowest")
NO_CURVES = {"time", "loss_spikes", "skipped_steps"}
"""Metrics that are shown in other ways."""


def run_charts(run: RunRecords) -> list[Chart]:
    """Those of a run, in the order of the page; a metric that none of them has gets a chart of its own."""
    return [drawn for drawn in _all_charts(run) if drawn is not None]


def _all_charts(run: RunRecords) -> Iterator[Chart | None]:
    metrics, bounds = run.metrics, bounds_of(run)
    loss = metrics.get("loss")
    yield chart(
        Axes(
            "loss",
            marks=[*_spikes(run), *_skips(run)],
            bounds=bounds,
            note=_note_on_marks(run),
        ),
        [Line("loss", loss, faint=True, colour=0), Line("average", smoothed(loss), colour=0)],
    )
    scores = [name for name in metrics.of if SCORE.fullmatch(name)]
    yield chart(
        Axes("scores on the validation set", "%", bounds=bounds),
        [Line(name, metrics.get(name), dots=True) for name in scores],
    )
    terms = [name for name in metrics.of if name != "loss" and "loss" in name and name not in NO_CURVES]
    yield chart(
        Axes("loss terms, averages", may_be_logarithmic=True, bounds=bounds),
        [Line(name, smoothed(metrics.get(name))) for name in terms],
    )
    yield _learning_rates(run)
    norms = ["grad_norm", "grad_norm_max"]
    yield chart(
        Axes("gradient norm before clipping", may_be_logarithmic=True, bounds=bounds),
        _averaged(run, *norms),
    )
    yield chart(
        Axes("images per second", from_zero=True, bounds=bounds),
        _averaged(run, "images_per_s"),
    )
    yield chart(
        Axes("utilization of the hardware", "%", from_zero=True, bounds=bounds),
        _averaged(run, *UTILIZATION),
    )
    yield chart(
        Axes("waiting, share of the time", "%", from_zero=True, bounds=bounds),
        _averaged(run, *WAITS),
    )
    yield chart(
        Axes("peak memory of rank 0", "GiB", from_zero=True, bounds=bounds),
        [Line("peak_gib", metrics.get("peak_gib"))],
    )
    known = {
        "loss",
        "lr",
        "images_per_s",
        "peak_gib",
        *NO_CURVES,
        *scores,
        *terms,
        *norms,
        *UTILIZATION,
        *WAITS,
    }
    for name in metrics.of:
        if name not in known and not SCORE_OF_A_CLASS.fullmatch(name) and name not in metrics.scores:
            unit = "%" if is_percent(name) else ""
            yield chart(Axes(name, unit, bounds=bounds), _averaged(run, name))


def _averaged(run: RunRecords, *names: str) -> list[Line]:
    """The curves of metrics that jump: their records are faint behind the averages of these."""
    found = [(name, run.metrics.get(name), colour) for colour, name in enumerate(names)]
    few = all(len(series.steps) <= FEW for _, series, _ in found)
    if few:
        return [Line(name, series, colour=colour) for name, series, colour in found]
    behind = [Line(name, series, faint=True, colour=colour) for name, series, colour in found]
    return [
        *behind,
        *(Line(f"{name}, average", smoothed(series), colour=colour) for name, series, colour in found),
    ]


def bounds_of(run: RunRecords) -> list[tuple[float, str]]:
    """Where the run began again."""
    return [(restart.step, f"resumed from step {restart.step:,}") for restart in run.restarts]


def _spikes(run: RunRecords) -> list[Mark]:
    """Records in whose interval the loss of some step stood out."""
    loss = dict(zip(*_lists(run.metrics.get("loss")), strict=True))
    found = [
        Mark(step, loss[step], f"step {step:,.0f}: loss {loss[step]:.4g}, {count:.0f} of its steps spiked")
        for step, count in zip(*_lists(run.metrics.get("loss_spikes")), strict=True)
        if count > 0 and step in loss
    ]
    return sorted(found, key=lambda mark: mark.value or 0.0)[-MOST_MARKS:]


def _lists(series: Series) -> tuple[list[float], list[float]]:
    return series.finite.steps.tolist(), series.finite.values.tolist()


def _skips(run: RunRecords) -> list[Mark]:
    return [
        Mark(step, None, f"step {step:,} was skipped")
        for skipped in run.skipped[-MOST_MARKS:]
        if isinstance(step := skipped.get("step"), int)
    ]


def _note_on_marks(run: RunRecords) -> str:
    words = ["pale: each record; bold: their average"]
    if len(run.metrics.get("loss_spikes").steps):
        words.append("red: records with a spike")
    if run.skipped:
        words.append("red at the foot: skipped steps")
    return "; ".join(words)


def _learning_rates(run: RunRecords) -> Chart | None:
    """Of each layer group by the schedule of each start, over the steps that it was in force; the highest as
    it was recorded."""
    pieces: dict[str, list[tuple[Sequence[int], Sequence[float]]]] = {}
    for place, start in enumerate(run.starts):
        following = run.starts[place + 1].step if place + 1 < len(run.starts) else start.max_steps
        for rates in start.learning_rates:
            kept = [(step, rate) for step, rate in zip(rates.steps, rates.rates) if step <= following]
            if kept:
                pieces.setdefault(rates.name, []).append(
                    ([step for step, _ in kept], [rate for _, rate in kept])
                )
    axes = Axes(
        "learning rate by layer group" if len(pieces) > 1 else "learning rate",
        bounds=bounds_of(run),
        legend=False,
        note=_note_on_rates(list(pieces)),
    )
    lines = [
        Line(
            name,
            Series(
                np.concatenate([np.asarray(steps, float) for steps, _ in of_name]),
                np.concatenate([np.asarray(rates, float) for _, rates in of_name]),
            ),
            style=_on_scale(place, len(pieces)),
        )
        for place, (name, of_name) in enumerate(pieces.items())
    ]
    return chart(axes, [*lines, Line("lr, as recorded", run.metrics.get("lr"), faint=bool(lines))])


def _note_on_rates(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    return f"{len(names)} rates by the schedule, from {names[0]} (blue) to {names[-1]} (orange)"


def _on_scale(place: int, count: int) -> str:
    """A colour between blue and orange that both a light and a dark page show."""
    hue = 215 - 185 * place / max(1, count - 1)
    return f"stroke:hsl({hue:.0f} 75% 52%)"
