"""What the training loop needs of the engine that it trains."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from internseg_ds.data.loading import Batch
from internseg_ds.distributed.process_group import World
from internseg_ds.distributed.watchdog import Watchdog
from internseg_ds.evaluation.evaluator import Evaluation, ImageObserver
from internseg_ds.monitoring.throughput import Meter
from internseg_ds.optimization.ema import ShardedEma
from internseg_ds.preflight.preflight import Plan
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.run_options import RunOptions
from internseg_ds.training.stop_requests import StopRequests
from internseg_ds.training.train_state import TrainState


class TrainingRun(Protocol):
    """`SegmentorEngine` is one; see there for what each of these is."""

    plan: Plan
    options: RunOptions
    state: TrainState
    deepspeed: Any
    ema: ShardedEma | None
    checkpoints: Checkpointer
    watch: Watchdog
    stop_requests: StopRequests
    meter: Meter
    stopped: bool
    resumed_unscored: bool

    @property
    def world(self) -> World: ...

    @property
    def work_dir(self) -> Path: ...

    def forward(self, batch: Batch) -> dict[str, Tensor]: ...

    def save(self) -> Path | None: ...

    def evaluate(
        self,
        *,
        verbose: bool = True,
        stop: Callable[[], bool] = ...,
        observers_of: Callable[[int, Any], Sequence[ImageObserver]] = ...,
    ) -> Evaluation: ...
