"""Line charts as shapes on a plane: what a template draws as SVG. Numbers in, coordinates and labels out."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from internseg_ds.run_report.curves import thinned
from internseg_ds.run_report.records import Series

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 24
"""Of the plane in units of the SVG, and its margins around the curves."""
COLOURS = 8
"""Of lines, by the style sheet; there are as many as there may be lines without a colour of their own."""
CLIPPED = 3.0
"""A chart ends above all but one in a hundred values where the highest is so many times those."""
LOGARITHMIC = 100.0
"""Values that span more than this factor are drawn by their logarithms, where a chart may."""


@dataclass(frozen=True)
class Line:
    """A curve. colour: its number among the style sheet's, that of its place by default; style: CSS over it.
    faint: behind the others, and not in the legend."""

    name: str
    series: Series
    faint: bool = False
    style: str = ""
    dots: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Mark:
    """Something that stands out at a step."""

    step: float
    value: float | None
    """None: at the foot of the chart."""
    text: str


@dataclass(frozen=True)
class Drawn:
    """A curve on the plane."""

    name: str
    colour: int
    style: str
    faint: bool
    points: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart on the plane of WIDTH x HEIGHT. x_ticks, y_ticks: place and label. marks: place and text.
    bounds: vertical lines, with their texts. data: JSON of the curves' steps and values, for a pointer."""

    title: str
    unit: str
    lines: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, float, str]]
    bounds: list[tuple[float, str]]
    data: str
    note: str = ""
    legend: bool = True


@dataclass(frozen=True)
class Axes:
    """What a chart shows beside its lines."""

    title: str
    unit: str = ""
    may_be_logarithmic: bool = False
    from_zero: bool = False
    marks: Sequence[Mark] = ()
    bounds: Sequence[tuple[float, str]] = field(default=())
    note: str = ""
    legend: bool = True


@dataclass(frozen=True)
class _Scale:
    """From values to places: by their logarithms or not."""

    least: float
    most: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        value = min(max(value, self.least), self.most)
        low, high = self.least, self.most
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)


def chart(axes: Axes, lines: Sequence[Line]) -> Chart | None:
    """The chart of some curves, thinned; None where none has a value."""
    shown = [(line, thinned(line.series)) for line in lines]
    shown = [(line, series) for line, series in shown if len(series.steps)]
    if not shown:
        return None
    steps = np.concatenate([series.steps for _, series in shown])
    x = _x_scale(steps)
    y = _y_scale([series for line, series in shown if not line.faint] or [shown[0][1]], shown, axes)
    drawn = [
        Drawn(
            line.name,
            (place if line.colour is None else line.colour) % COLOURS,
            line.style,
            line.faint,
            " ".join(f"{x.place(step)},{y.place(value)}" for step, value in _pairs(series)),
            [(x.place(step), y.place(value)) for step, value in _pairs(series)]
            if line.dots or len(series.steps) == 1
            else [],
        )
        for place, (line, series) in enumerate(shown)
    ]
    data = [
        {
            "name": line.name,
            "x": [round(step) for step in series.steps.tolist()],
            "y": [_rounded(value) for value in series.values.tolist()],
        }
        for line, series in shown
    ]
    span = {"from": x.least, "to": x.most, "lines": data, "unit": axes.unit}
    return Chart(
        axes.title,
        axes.unit,
        drawn,
        [(x.place(tick), readable(tick)) for tick in _linear_ticks(x.least, x.most, 5, whole=True)],
        [(y.place(tick), readable(tick)) for tick in _y_ticks(y)],
        [_on_plane(mark, x, y) for mark in axes.marks if x.least <= mark.step <= x.most],
        [(x.place(step), text) for step, text in axes.bounds if x.least <= step <= x.most],
        json.dumps(span, separators=(",", ":")),
        axes.note,
        axes.legend and sum(not line.faint for line, _ in shown) > 1,
    )


def _pairs(series: Series) -> list[tuple[float, float]]:
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def _on_plane(mark: Mark, x: _Scale, y: _Scale) -> tuple[float, float, str]:
    height = HEIGHT - BOTTOM if mark.value is None else y.place(mark.value)
    return x.place(mark.step), height, mark.text


def _x_scale(steps: np.ndarray) -> _Scale:
    least, most = float(steps.min()), float(steps.max())
    if least == most:
        least, most = least - 1, most + 1
    return _Scale(least, most, LEFT, WIDTH - RIGHT)


def _y_scale(main: Sequence[Series], shown: Sequence[tuple[Line, Series]], axes: Axes) -> _Scale:
    values = np.concatenate([series.values for _, series in shown])
    least, most = float(values.min()), float(values.max())
    start, end = HEIGHT - BOTTOM, TOP
    if axes.may_be_logarithmic and least > 0 and most > LOGARITHMIC * least:
        return _Scale(least / 1.1, most * 1.1, start, end, logarithmic=True)
    usual = max(float(np.quantile(values, 0.99)), *(float(series.values.max()) for series in main))
    if most > CLIPPED * usual > 0:
        most = 1.2 * usual
    if axes.from_zero:
        least = min(least, 0.0)
    margin = 0.05 * (most - least) or 0.05 * abs(most) or 1.0
    return _Scale(least if axes.from_zero else least - margin, most + margin, start, end)


def _y_ticks(scale: _Scale) -> list[float]:
    if not scale.logarithmic:
        return _linear_ticks(scale.least, scale.most, 5)
    ticks = [tick for tick in LogLocator(numticks=6).tick_values(scale.least, scale.most)]
    inside = [float(tick) for tick in ticks if scale.least <= tick <= scale.most]
    return inside if len(inside) > 1 else [scale.least * 1.1, scale.most / 1.1]


def _linear_ticks(least: float, most: float, count: int, *, whole: bool = False) -> list[float]:
    ticks = MaxNLocator(count, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(least, most)
    return [float(tick) for tick in ticks if least <= tick <= most]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def readable(value: float) -> str:
    """A number in a few characters, thousands of thousands as k and M."""
    value = 0.0 if abs(value) < 1e-15 else value
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1000 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
