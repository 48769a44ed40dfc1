"""What a tracker is told of a run, and what it is.

Each works in a thread of its own (`background`), so it may take its time; what it raises ends it, and never the
training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from internseg_ds.monitoring.evaluation_record import EvaluationRecord
from internseg_ds.monitoring.trackers.best import Best


@dataclass(frozen=True)
class RunInfo:
    """One start of a run."""

    run: str
    """What tells the run from others. It is in its checkpoints, so one that goes on has it again."""
    name: str
    """Of the run, for people: that of its work directory."""
    work_dir: Path
    start: int
    """The step that the run goes on from; 0 for one that starts anew."""
    config: Mapping[str, Any]
    """As the run is trained with."""
    ds_config: Mapping[str, Any]
    environment: Sequence[str]
    """Versions with this package's git revision; date, seed and hosts; the command."""


class Tracker(Protocol):
    """Shows one run. Every method but `abandon` is called by one and the same thread, `start` first and `close`
    last."""

    name: str
    """For the log."""

    def start(self, info: RunInfo) -> None:
        """Opens the run, or goes on with it."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """A record of the run: metrics of a step by their names."""

    def evaluation(self, evaluation: EvaluationRecord, best: Best | None) -> None:
        """What an evaluation leaves, whose scores `record` was given before. best: with this evaluation."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""

    def close(self, *, failed: bool) -> None:
        """Sends what is left. failed: whether the training ended with an error."""

    def abandon(self) -> None:
        """Called by the main thread when another method has not returned in time: whatever of it would hold up the
        end of the process is to go. Does not wait."""
