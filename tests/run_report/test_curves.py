"""Curves on a page: thinned, averaged, on a plane."""

import json

import numpy as np
import pytest

from internseg_ds.run_report.chart import Axes, Line, Mark, chart, readable
from internseg_ds.run_report.curves import MOST, smoothed, thinned
from internseg_ds.run_report.records import Series
from internseg_ds.run_report.run_charts import run_charts
from internseg_ds.run_report.settings import differing, settings_of
from tests.run_report.runs import write_run


def series(values):
    return Series(np.arange(1.0, len(values) + 1), np.asarray(values, float))


def test_a_thinned_curve_keeps_spikes_dips_and_ends():
    values = np.ones(80_000)
    values[[12_345, 50_000]] = 57.0, -3.0
    found = thinned(series(values))
    assert len(found.steps) <= MOST and (np.diff(found.steps) > 0).all()
    assert (found.steps[0], found.steps[-1]) == (1, 80_000)
    kept = dict(zip(found.steps.tolist(), found.values.tolist(), strict=True))
    assert kept[12_346] == 57.0 and kept[50_001] == -3.0


def test_few_records_are_all_there_but_for_those_without_a_value():
    assert thinned(series([1, np.nan, 3])).steps.tolist() == [1, 3]


def test_an_average_has_no_bias_at_its_beginning():
    assert smoothed(series([7.0] * 9)).values == pytest.approx([7.0] * 9)
    generator = np.random.default_rng(0)
    noisy = series(3 + generator.normal(0, 1, 5000))
    assert smoothed(noisy).values[-1] == pytest.approx(3, abs=0.5)


def test_a_chart_of_a_run_with_a_spike_still_shows_the_rest():
    values = [2 - 0.005 * step for step in range(200)]
    values[150] = 1000.0
    drawn = chart(
        Axes("loss", marks=[Mark(151, 1000.0, "spike")]),
        [Line("loss", series(values), faint=True), Line("average", series(values[:150]))],
    )
    heights = [float(point.split(",")[1]) for point in drawn.lines[0].points.split()]
    assert max(heights) - min(heights) > 100  # of 230: the curve is no flat line at the foot
    assert drawn.marks[0][1] == min(heights)  # at the upper edge
    assert 1000.0 in json.loads(drawn.data)["lines"][0]["y"]  # the value is not cut


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 1e-3, 10.0], [-1.0, 5.0]])
def test_any_values_make_a_chart(values):
    drawn = chart(Axes("x", may_be_logarithmic=True), [Line("x", series(values))])
    places = [float(number) for point in drawn.lines[0].points.split() for number in point.split(",")]
    assert np.isfinite(places).all() and drawn.y_ticks


def test_no_values_make_no_chart():
    assert chart(Axes("x"), [Line("x", series([np.nan, np.inf]))]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (80_000, "80k"), (2_500_000, "2.5M"), (4e-5, "4e-5"), (0.25, "0.25"), (5000, "5000")],
)
def test_labels_are_short(value, text):
    assert readable(value) == text


def test_every_metric_has_a_curve(tmp_path):
    from internseg_ds.run_report.records import read_run

    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "time": 1.0, "loss": 1.0, "of_somebodys_own": 4.0}) + "\n")
    names = {line.name for drawn in run_charts(read_run(folder)) for line in drawn.lines}
    assert {"loss", "mIoU", "layer 2", "grad_norm", "images_per_s", "peak_gib", "of_somebodys_own"} <= names


def test_settings_that_differ_are_named_and_nothing_is_executed(tmp_path):
    marker = tmp_path / "executed"
    config = (
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "data = dict(train=dict(pipeline=[dict(type='Crop', size={size}), dict(type='Flip')]), mean=[1, 2])\n"
        "x = print('no')\n"
    )
    left, right = (settings_of(config.replace("{size}", size), '{"zero": {"stage": 3}}') for size in "12")
    assert differing([left, right]) == [("data.train.pipeline.0.size", ["1", "2"])]
    assert left["ds_config.zero.stage"] == "3" and left["x"] == "print('no')" and not marker.exists()
    assert settings_of("this is = no python", "{")["config.py"] == "cannot be read"
