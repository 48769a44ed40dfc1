"""report.html of a real run, in a real browser, on a desktop's width and a phone's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internseg_ds.monitoring.evaluation_record import evaluation_files, read_evaluation
from internseg_ds.monitoring.run_starts import read_starts
from internseg_ds.monitoring.units import in_percent
from internseg_ds.run_report.page import write_comparison
from tests.browser import Watched, watched
from tests.run_report.runs import write_run


@contextmanager
def opened(browser: Any, file: Path, width: int, scheme: str) -> Iterator[Watched]:
    with watched(browser, width, color_scheme=scheme, offline=True) as seen:
        seen.page.set_default_timeout(60_000)
        seen.page.goto(file.as_uri())
        yield seen
        assert seen.said == seen.errors == []
        assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []


def contrast(page: Any, selector: str) -> float:
    """Of a text to the page's ground, as WCAG 2.1 defines it (1 to 21)."""
    colours = page.evaluate(
        "s => [getComputedStyle(document.querySelector(s)).color, getComputedStyle(document.body).backgroundColor]",
        selector,
    )
    light = []
    for colour in colours:
        channels = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_a_run_leaves_records_of_its_evaluations_and_its_start(trained):
    files = evaluation_files(trained.work_dir / "evaluations")
    assert list(files) == [0, 6, 12] and set(trained.scores) == {0, 6, 12}
    newest = read_evaluation(files[12])
    written = next(r for r in trained.records if r["step"] == 12 and "mIoU" in r)
    assert in_percent(newest.scores) == {
        name: value for name, value in written.items() if name not in ("v", "step", "time")
    }
    assert newest.images == 7 and len(newest.classes) == 150
    for name, iou in zip(newest.classes, newest.iou.tolist(), strict=True):
        assert (f"IoU.{name}" in written) == np.isfinite(iou)
        assert np.isnan(iou) or written[f"IoU.{name}"] == pytest.approx(100 * iou, abs=1e-2)
    fixed, best, worst = (
        [p for p in newest.pictures if p.sort == sort] for sort in ("fixed", "best", "worst")
    )
    # 7 images, so 3 of the best and 3 of the worst have one between them
    assert len(fixed) == 4 and len(best) == len(worst) == 3
    scores = [shown.score for shown in (*best, *reversed(worst))]
    assert scores == sorted(scores, reverse=True)
    earlier = read_evaluation(files[0])
    assert [p.name for p in earlier.pictures if p.sort == "fixed"] == [p.name for p in fixed]

    (start,) = read_starts(trained.work_dir)
    assert start.step == 0 and start.max_steps == 12 and start.data["validation images"] == "7"
    assert any("classes occur in none" in warning for warning in start.warnings)
    # what was typed, with its launcher and the way on
    assert re.search(
        r"&& (\S*/)?deepspeed --num_gpus 2 .*launch/train\.py .* --resume auto$", start.resume_command
    )
    rates = {record["step"]: record["lr"] for record in trained.records if "lr" in record}
    highest = start.learning_rates[0]
    assert dict(zip(highest.steps, highest.rates, strict=True)) == pytest.approx(rates, rel=1e-4)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_of_a_run_in_a_browser(trained, browser, width, scheme):
    with opened(browser, trained.work_dir / "report.html", width, scheme) as seen:
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert contrast(page, "body") > 7 and contrast(page, ".quiet") > 4.5
        shown = page.inner_text("body")
        score = trained.scores[12]
        assert f"{score:.2f} %" in shown and "step 12 of 12, finished" in shown
        rows = page.eval_on_selector_all(
            "#class-table tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText))"
        )
        written = next(r for r in trained.records if r["step"] == 12 and "mIoU" in r)
        expected = {
            name[4:].strip(): value
            for name, value in written.items()
            if name.startswith("IoU.") and f"Acc.{name[4:]}" in written
        }
        assert {row[1].strip(): row[2] for row in rows} == {
            n: f"{value:.2f}" for n, value in expected.items()
        }
        values = [float(row[2]) for row in rows]
        assert values == sorted(values, reverse=True)
        # pictures are there, and none is broken
        sizes = page.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)")
        assert len(sizes) > 20 and min(sizes) > 0
        # the pointer at the right edge of the first chart shows the loss of the last step
        svg = page.query_selector(".chart svg")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 14, box["y"] + box["height"] / 2)
        tip = page.inner_text(".chart .tip")
        assert tip.startswith("step 12\n")
        assert float(re.search(r"loss: (\S+)", tip)[1]) == pytest.approx(trained.losses[12], rel=1e-4)
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # with the tip, too


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_runs_compared_in_a_browser(trained, browser, tmp_path, width, scheme):
    other = write_run(tmp_path / "<script>alert(3)<_script>", lr=2e-3)
    both = write_comparison([trained.work_dir, other], tmp_path / "both.html")
    with opened(browser, both, width, scheme) as seen:
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        names = page.eval_on_selector_all("#runs tbody tr", "rows => rows.map(r => r.cells[0].innerText)")
        assert names == [trained.work_dir.name, other.name]
        assert "optimizer.lr" in page.inner_text("#differing")
        lines = page.eval_on_selector_all(
            ".chart", "all => all.map(c => JSON.parse(c.dataset.chart).lines.length)"
        )
        assert lines[0] == 2


def test_the_command_writes_a_page(trained, launch, tmp_path):
    both = tmp_path / "both.html"
    other = write_run(tmp_path / "other")
    done = launch("launch/report.py", trained.work_dir, other, "--out", both, processes=1)
    assert str(both) in done.stdout and "2 runs compared" in both.read_text()
