"""A thread for each tracker, so that one which hangs, fails or is slow costs the training nothing but its own
curves."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition, Thread

from internseg_ds.errors import counted, reason_of
from internseg_ds.monitoring.evaluation_record import EvaluationRecord
from internseg_ds.monitoring.trackers.best import Best
from internseg_ds.monitoring.trackers.tracker import RunInfo, Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How many may wait, and seconds.

    records, evaluations: beyond which new ones are left out; an evaluation has some MiB of pictures. start_s: after
    which a tracker that has not started is given up. close_s: that the end of a run waits at most, and error_close_s
    after an error, which the other ranks have to hear of. settle_s: the same of `settle`.
    """

    records: int = 1000
    evaluations: int = 3
    start_s: float = 120.0
    close_s: float = 20.0
    error_close_s: float = 5.0
    settle_s: float = 1.0


@dataclass
class Job:
    act: Callable[[], None]
    is_evaluation: bool = False


class BackgroundTracker:
    """Does what a tracker is told in a thread of its own, in that order. No method waits or raises, but for
    `settle` and `join`, which wait as long as they say."""

    def __init__(self, tracker: Tracker, info: RunInfo, limits: Limits) -> None:
        self._tracker, self._limits = tracker, limits
        self._changed = Condition()
        """Guards everything below."""
        self._jobs: deque[Job] = deque([Job(partial(tracker.start, info))])
        self._busy_since: float | None = None
        self._began = time.monotonic()
        self._started = self._off = self._ending = self._failed = False
        self._left_out = 0
        # a process that ends does not wait for it
        self._thread = Thread(target=self._work, name=tracker.name, daemon=True)
        self._thread.start()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._add(Job(partial(self._tracker.record, step, dict(values))))

    def evaluation(self, evaluation: EvaluationRecord, best: Best | None) -> None:
        self._add(Job(partial(self._tracker.evaluation, evaluation, best), is_evaluation=True))

    def checkpoint(self, step: int, folder: Path) -> None:
        self._add(Job(partial(self._tracker.checkpoint, step, folder)))

    def settle(self) -> None:
        """Returns when the tracker has nothing to do, or after `settle_s`; at once where it has hung longer than that
        already. A process that forks should have no thread at work."""
        with self._changed:
            since = self._busy_since
            if since is None or time.monotonic() - since < self._limits.settle_s:
                self._changed.wait_for(lambda: self._off or self._idle(), self._limits.settle_s)

    def end(self, *, failed: bool) -> None:
        """Lets the tracker close once it has done what waits."""
        with self._changed:
            self._ending, self._failed = True, failed
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """After `end`: returns when the tracker is closed, or after so many seconds."""
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._off:
            self._off = True
            log.warning("%s has not ended in time and is left", self._tracker.name)
            with suppress(Exception):
                self._tracker.abandon()
        if self._left_out:
            log.warning("%s: %s left out", self._tracker.name, counted(self._left_out, "record"))

    def _idle(self) -> bool:
        return not self._jobs and self._busy_since is None

    def _add(self, job: Job) -> None:
        with self._changed:
            if self._off:
                return
            if not self._started and time.monotonic() - self._began > self._limits.start_s:
                self._switch_off(f"it has not started within {self._limits.start_s:.0f} s")
                return
            waiting = sum(each.is_evaluation for each in self._jobs)
            if len(self._jobs) < self._limits.records and not (
                job.is_evaluation and waiting >= self._limits.evaluations
            ):
                self._jobs.append(job)
                self._changed.notify_all()
                return
            self._left_out += 1
            if self._left_out == 1:
                log.warning(
                    "%s is slow or does not answer: %s for it, and what comes now is left out; the training goes on",
                    self._tracker.name,
                    f"{counted(len(self._jobs), 'record')} wait",
                )

    def _switch_off(self, why: str) -> None:
        """While `_changed` is held."""
        self._off = True
        self._jobs.clear()
        self._changed.notify_all()
        log.warning("%s is switched off: %s; the training goes on", self._tracker.name, why)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.act()
            except (
                BaseException
            ) as error:  # whatever a library raises, SystemExit too, is no end of a training
                with self._changed:
                    if not self._off:
                        self._switch_off(reason_of(error))
            with self._changed:
                self._started, self._busy_since = True, None
                self._changed.notify_all()
        try:
            self._tracker.close(failed=self._failed)
        except BaseException as error:
            if not self._off:
                log.warning("%s could not be closed: %s", self._tracker.name, reason_of(error))

    def _next(self) -> Job | None:
        """Waits for it; None when there is nothing left to do but to close."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ending or self._off)
            if self._off or not self._jobs:
                return None
            self._busy_since = time.monotonic()
            return self._jobs.popleft()
