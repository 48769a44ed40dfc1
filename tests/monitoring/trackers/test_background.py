"""Trackers that fail, hang and are slow."""

import logging
import threading
import time
from pathlib import Path

import pytest

from internseg_ds.monitoring.evaluation_record import EvaluationRecord
from internseg_ds.monitoring.trackers.background import BackgroundTracker, Limits
from internseg_ds.monitoring.trackers.best import Best, best_recorded
from internseg_ds.monitoring.trackers.opening import Trackers
from tests.monitoring.trackers.runs import run_info
from tests.run_report.runs import evaluation


class Notes:
    """A tracker that notes what it is told, and waits or fails where the test wants it."""

    name = "Notes"

    def __init__(self, *, fails: str = "", with_: BaseException | None = None) -> None:
        self.told: list[object] = []
        self.fails, self.error = fails, with_
        self.abandoned = False
        self.go_on = threading.Event()
        self.go_on.set()

    def _note(self, *what: object) -> None:
        self.go_on.wait()
        if what[0] == self.fails and self.error is not None:
            raise self.error
        self.told.append(what)

    def start(self, info: object) -> None:
        self._note("start")

    def record(self, step: int, values: object) -> None:
        self._note("record", step)

    def evaluation(self, evaluation: EvaluationRecord, best: Best | None) -> None:
        self._note("evaluation", evaluation.step, best)

    def checkpoint(self, step: int, folder: Path) -> None:
        self._note("checkpoint", step)

    def close(self, *, failed: bool) -> None:
        self._note("close", failed)

    def abandon(self) -> None:
        self.abandoned = True


@pytest.fixture
def started(tmp_path):
    def start(notes: Notes, **limits: float) -> BackgroundTracker:
        return BackgroundTracker(notes, run_info(tmp_path), Limits(**limits))

    return start


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_all_is_told_in_its_order(started, tmp_path, caplog):
    notes = Notes()
    tracker = started(notes)
    tracker.record(1, {"loss": 1.0})
    tracker.evaluation(evaluation(1), None)
    tracker.checkpoint(1, tmp_path)
    tracker.end(failed=True)
    tracker.join(5)
    told = [("start",), ("record", 1), ("evaluation", 1, None), ("checkpoint", 1), ("close", True)]
    assert notes.told == told and warnings(caplog) == []


@pytest.mark.parametrize("error", [RuntimeError("it broke"), SystemExit(3)])
def test_one_that_raises_is_switched_off_after_one_line(started, caplog, error):
    notes = Notes(fails="record", with_=error)
    tracker = started(notes)
    for step in range(1, 6):
        tracker.record(step, {})
        tracker.settle()
    tracker.end(failed=False)
    tracker.join(5)
    assert notes.told == [("start",), ("close", False)]
    (line,) = warnings(caplog)
    assert line.startswith(f"Notes is switched off: {type(error).__name__}: ") and "goes on" in line


def test_one_that_hangs_costs_no_time_and_what_finds_no_room_is_counted(started, caplog):
    notes = Notes()
    notes.go_on.clear()
    tracker = started(notes, records=10, evaluations=2, close_s=0.2, settle_s=0.1)
    tracker.settle()
    began = time.monotonic()
    for step in range(2000):
        tracker.record(step, {"loss": 1.0})
        tracker.evaluation(evaluation(3), None)
        tracker.settle()  # that it hangs is known: nobody waits again
    assert time.monotonic() - began < 1 + 2000 * 1e-3  # of this loop without a tracker, 0.2 s
    tracker.end(failed=False)
    tracker.join(0.2)
    assert notes.abandoned
    slow, left, count = warnings(caplog)
    # two evaluations between three records, until there is no room for a third one; in all 10 find room
    assert (
        "5 records wait" in slow
        and "has not ended in time" in left
        and count.startswith("Notes: 3990 records")
    )
    notes.go_on.set()  # however late, nothing is logged twice
    time.sleep(0.1)
    assert len(warnings(caplog)) == 3


def test_one_that_does_not_start_is_given_up(started, caplog):
    notes = Notes()
    notes.go_on.clear()
    tracker = started(notes, start_s=0.05)
    tracker.record(1, {})
    time.sleep(0.1)
    tracker.record(2, {})
    tracker.record(3, {})
    notes.go_on.set()
    tracker.end(failed=False)
    tracker.join(5)
    assert notes.told == [("start",), ("close", False)]
    (line,) = warnings(caplog)
    assert "has not started within" in line


def test_the_best_score_is_that_of_all_starts(started, tmp_path):
    records = tmp_path / "metrics.jsonl"
    records.write_text(
        '{"step": 0, "mIoU": 90.0}\n{"step": 1, "loss": 2}\n{"step": 2, "mIoU": 25.0}\n'
        '{"step": 4, "mIoU": 75.0}\n{"step": 6, "mIoU": null}\n{"step": 8, "mI'
    )
    assert best_recorded(records, "mIoU") == Best("mIoU", 4, 75.0)
    notes = Notes()
    tracker = started(notes)
    trackers = Trackers([tracker], score="mIoU", best=best_recorded(records, "mIoU"))
    for step, score in ((6, 50.0), (8, float("nan")), (10, 80.0)):
        trackers.record(step, {"mIoU": score})
        trackers.evaluation(evaluation(step))
    trackers.settle()
    assert [told[2] for told in notes.told if told[0] == "evaluation"] == [
        Best("mIoU", 4, 75.0),
        Best("mIoU", 4, 75.0),
        Best("mIoU", 10, 80.0),
    ]
    tracker.end(failed=False)
