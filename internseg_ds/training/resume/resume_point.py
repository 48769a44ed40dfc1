"""The checkpoint that a run goes on from, read into its model, optimizer and average; with the way back to an
earlier one where it turns out to be damaged."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from internseg_ds.checkpoints.weights import weights_of
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.process_group import raise_on_every_rank
from internseg_ds.distributed.weight_loading import load, match_saved
from internseg_ds.errors import CheckpointError, DamagedError
from internseg_ds.optimization.ema import ShardedEma
from internseg_ds.optimization.restore import restore
from internseg_ds.preflight.preflight import Plan
from internseg_ds.training.resume.find_checkpoint import changes_since, one_before

log = logging.getLogger(__name__)


class ResumePoint:
    """The checkpoint that a run goes on from, as its values are read: where they turn out to be damaged and
    the run may choose (`--resume auto`), the newest whole one before it. Every method is collective."""

    def __init__(self, checkpoint: ZeroCheckpoint, plan: Plan, *, may_go_back: bool) -> None:
        self.checkpoint, self.plan, self.may_go_back = checkpoint, plan, may_go_back
        self._loaded: ZeroCheckpoint | None = None

    def load_weights(self, model: nn.Module) -> None:
        """Gives a model, which ZeRO-3 may have partitioned, the checkpoint's weights. Raises CheckpointError
        on every rank."""
        self._read(partial(self._load_weights, model))

    def restore(self, deepspeed_engine: Any, ema: ShardedEma | None) -> None:
        """Gives optimizer, schedule and average the checkpoint's state, after `load_weights`. Raises
        CheckpointError on every rank."""
        self._read(partial(self._restore, deepspeed_engine, ema))

    def _read(self, read: Callable[[ZeroCheckpoint], None]) -> None:
        """Calls `read` with the checkpoint, and again with an earlier one where it is damaged."""
        while True:
            try:
                read(self.checkpoint)
                return
            except DamagedError as error:
                if not self.may_go_back:
                    raise
                self._go_back(error)

    def _go_back(self, error: DamagedError) -> None:
        check = self.plan.experiment.engine.checksums
        earlier = one_before(self.checkpoint, self.plan.ds.stage, check=check)
        if earlier is None:
            folder = self.checkpoint.path.parent
            raise DamagedError(f"{error}; no checkpoint before it in {folder} is whole") from None
        if self.plan.world.is_main:
            log.warning("%s; going on from %s, the one before it", error, earlier.path)
        for change in changes_since(earlier.path, self.plan):
            log.info("%s", change)
        self.checkpoint = earlier

    def _load_weights(self, model: nn.Module, checkpoint: ZeroCheckpoint) -> None:
        load(model, match_saved(model, weights_of(checkpoint)))
        self._loaded = checkpoint

    def _restore(self, deepspeed_engine: Any, ema: ShardedEma | None, checkpoint: ZeroCheckpoint) -> None:
        if checkpoint is not self._loaded:
            self._load_weights(deepspeed_engine.module, checkpoint)
        trouble: CheckpointError | None = None
        try:
            restore(deepspeed_engine, checkpoint, self.plan.experiment.schedule)
            if ema is not None:
                ema.restore(checkpoint)
        except CheckpointError as error:  # this rank's own; the others are about to wait for it
            trouble = error
        raise_on_every_rank(trouble)
