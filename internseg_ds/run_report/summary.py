"""What a run has come to, in a few figures: how far it is, its loss, its scores, its speed."""

import itertools
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from internseg_ds.monitoring.units import SCORE
from internseg_ds.run_report.curves import smoothed
from internseg_ds.run_report.records import RunRecords, Series

RECENT = 20
"""Records at the end that a figure is the median of."""
LONGEST_GAP_S = 3600.0
"""Between two records of one start; where it is longer, or the run was started again, the time between them is
not counted."""


@dataclass(frozen=True)
class Figure:
    name: str
    text: str
    more: str = ""


def main_score(run: RunRecords) -> str | None:
    """The name of the score that a run is known by."""
    names = [name for name in run.metrics.of if SCORE.fullmatch(name)]
    return "mIoU" if "mIoU" in names else next((name for name in names if name.startswith("m")), None)


def status(run: RunRecords) -> str:
    """One line: how far the run is, as of when."""
    newest = run.metrics.get("time").last
    if newest is None:
        return "no records yet"
    last = f" of {run.max_steps:,}" if run.max_steps is not None else ""
    return (
        f"step {run.step:,}{last}{', finished' if run.finished else ''}; last record of {moment(newest[1])}"
    )


def moment(seconds: float) -> str:
    """A time of this machine's clock; "?" for what is none."""
    try:
        return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S %z}"
    except (ValueError, OverflowError, OSError):
        return "?"


def figures(run: RunRecords) -> list[Figure]:
    """Those that the run has."""
    metrics, found = run.metrics, list[Figure]()
    score = main_score(run)
    if score is not None and (last := metrics.get(score).last):
        if best := metrics.get(score).of_checkpoints.highest:
            found.append(Figure(f"best {score}", percent(best[1]), f"step {best[0]:,}"))
        found.append(Figure(f"last {score}", percent(last[1]), f"step {last[0]:,}"))
    loss = metrics.get("loss").last
    if loss is not None:
        average = smoothed(metrics.get("loss")).values[-1]
        found.append(Figure("loss", f"{average:.4g}", f"average; {loss[1]:.4g} in the last record"))
    for name, text in (("images_per_s", "images per second"), ("mfu", "mfu"), ("data_wait", "data_wait")):
        if (value := _recent(metrics.get(name))) is not None:
            found.append(
                Figure(text, f"{value:.4g}" if name == "images_per_s" else f"{value:.1f} %", "recent median")
            )
    if (peak := metrics.get("peak_gib").highest) is not None:
        found.append(Figure("peak memory", f"{peak[1]:.4g} GiB", "rank 0"))
    spikes = metrics.get("loss_spikes").finite.values.sum()
    found.append(Figure("skipped steps", f"{len(run.skipped):,}"))
    found.append(Figure("loss spikes", f"{spikes:,.0f}"))
    found.append(Figure("restarts", f"{len(run.restarts):,}"))
    found.append(Figure("time", _duration(run), "in which it trained and evaluated"))
    return found


def _recent(series: Series) -> float | None:
    values = series.finite.values[-RECENT:]
    return float(np.median(values)) if len(values) else None


def percent(value: float) -> str:
    return f"{value:.2f} %"


def _duration(run: RunRecords) -> str:
    times = run.metrics.get("time").finite.values
    if not len(times):
        return "0:00 h"
    began = [start.time for start in run.starts if start.time <= times[-1]]
    moments = sorted([*((time, False) for time in times.tolist()), *((time, True) for time in began)])
    gaps = [
        later - earlier for (earlier, _), (later, is_start) in itertools.pairwise(moments) if not is_start
    ]
    spent = sum(gap for gap in gaps if gap <= LONGEST_GAP_S)
    hours, minutes = divmod(round(spent / 60), 60)
    return f"{hours:,}:{minutes:02d} h"
