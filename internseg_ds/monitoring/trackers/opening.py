"""The trackers that a config's `log_config.hooks` ask for, opened around a training."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internseg_ds.monitoring.evaluation_record import EvaluationRecord
from internseg_ds.monitoring.trackers.background import BackgroundTracker, Limits
from internseg_ds.monitoring.trackers.best import Best
from internseg_ds.monitoring.trackers.tensorboard import TensorBoardTracker
from internseg_ds.monitoring.trackers.tracker import RunInfo, Tracker
from internseg_ds.monitoring.trackers.weights_and_biases import WandbOptions, WandbTracker

Hook = Mapping[str, Any]

OF_WANDB = ("WandbLoggerHook", "MMSegWandbHook")
MAKERS: Mapping[str, Callable[[Hook], Tracker]] = {
    "TensorboardLoggerHook": lambda hook: TensorBoardTracker(
        Path(hook["log_dir"]) if hook.get("log_dir") else None
    ),
    "WandbLoggerHook": lambda hook: WandbTracker(WandbOptions.of_hook(hook)),
    "MMSegWandbHook": lambda hook: WandbTracker(WandbOptions.of_hook(hook)),
}
"""By mmcv's and mmseg's names of their hooks."""


def check_trackers(hooks: Sequence[Hook]) -> None:
    """Raises ConfigError where a tracker cannot work."""
    for hook in hooks:
        if hook["type"] in OF_WANDB:
            WandbOptions.of_hook(hook).check()


def pictures_asked_for(hooks: Sequence[Hook]) -> int:
    """How many images an evaluation should keep for trackers."""
    return max((WandbOptions.of_hook(hook).pictures for hook in hooks if hook["type"] in OF_WANDB), default=0)


class Trackers:
    """Those of one run, none on ranks but the first. Everything is told to each of them, in threads of theirs."""

    def __init__(
        self, trackers: Sequence[BackgroundTracker] = (), *, score: str = "", best: Best | None = None
    ) -> None:
        """score: the name of that by which evaluations are compared. best: the highest so far."""
        self._trackers, self._score, self._best = trackers, score, best
        self._scores: Mapping[str, float] = {}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        if self._score in values:
            self._scores = values
        for tracker in self._trackers:
            tracker.record(step, values)

    def evaluation(self, evaluation: EvaluationRecord) -> None:
        """After the record of its scores."""
        best, name = self._best, self._score
        score = self._scores.get(name, math.nan)
        # before the first step there is nothing yet that could be the best
        if evaluation.step and not math.isnan(score) and (best is None or score > best.value):
            self._best = best = Best(name, evaluation.step, score)
        for tracker in self._trackers:
            tracker.evaluation(evaluation, best)

    def checkpoint(self, step: int, folder: Path) -> None:
        for tracker in self._trackers:
            tracker.checkpoint(step, folder)

    def settle(self) -> None:
        """Before this process forks others: returns when no tracker works, or after a second."""
        for tracker in self._trackers:
            tracker.settle()


@contextmanager
def open_trackers(
    hooks: Sequence[Hook],
    info: RunInfo,
    *,
    score: str = "",
    best: Best | None = None,
    limits: Limits | None = None,
) -> Iterator[Trackers]:
    """The trackers of one run, closed at the end of the block however it ends, for which it waits some seconds at
    most. By rank 0. score, best: as of `Trackers`."""
    limits = limits or Limits()
    # one of each service: the second hook of wandb's would open the same run again
    chosen = {hook["type"] in OF_WANDB or hook["type"]: hook for hook in hooks if hook["type"] in MAKERS}
    made = [MAKERS[hook["type"]](hook) for hook in chosen.values()]
    opened = [BackgroundTracker(tracker, info, limits) for tracker in made]
    failed = True
    try:
        trackers = Trackers(opened, score=score, best=best)
        trackers.settle()
        yield trackers
        failed = False
    finally:
        for tracker in opened:
            tracker.end(failed=failed)
        until = time.monotonic() + (limits.error_close_s if failed else limits.close_s)
        for tracker in opened:
            tracker.join(max(0.0, until - time.monotonic()))
