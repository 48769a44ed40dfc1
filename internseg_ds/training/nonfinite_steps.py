"""Steps whose loss or gradient is not finite: they are skipped, counted, and noted with their images; too
many in a row end the run.

DeepSpeed leaves weights and moments alone when the norm of the gradient is not finite on any rank. What it
does not know: a loss that is not finite whose gradient is, and batch-norm statistics, which the forward has
spoilt by then.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internseg_ds.distributed.process_group import gather_from_ranks
from internseg_ds.distributed.zero_internals import skipped_steps
from internseg_ds.errors import Diverged, counted
from internseg_ds.monitoring.buffered_lines import BufferedLines
from internseg_ds.monitoring.loggers import rewind
from internseg_ds.torch_internals import copy_tensors

log = logging.getLogger(__name__)


def nan_gradients_unless_finite(loss: Tensor) -> Tensor:
    """`loss`; one that is not finite makes every gradient NaN, so that the step is skipped. Does not wait for
    the device."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class NonfiniteSteps:
    """Those of one run. Every rank makes the same calls."""

    def __init__(self, deepspeed_engine: Any, file: Path, limit: int, *, start: int = 0) -> None:
        """file: a line of JSON is added for each skipped step. limit: skipped steps in a row that end the
        run. start: the step that the run goes on from."""
        self.deepspeed = deepspeed_engine
        self.file = file
        self.limit = limit
        self._lines = BufferedLines(file)
        self.in_a_row = 0
        self._seen = skipped_steps(deepspeed_engine)
        self._buffers = [buffer for buffer in deepspeed_engine.module.buffers() if buffer.numel()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        if dist.get_rank() == 0:
            rewind(file, start)

    def values(self) -> dict[str, float]:
        """For a log record: how many there were since the training began, restarts included, if any."""
        skipped = skipped_steps(self.deepspeed)
        return {"skipped_steps": skipped} if skipped else {}

    def after_step(self, step: int, micro_batches: Sequence[tuple[Tensor, list[str]]]) -> bool:
        """Whether DeepSpeed skipped this step. micro_batches: this rank's losses and image files. Collective
        when it did.

        Raises Diverged, on every rank, at the `limit`-th in a row.
        """
        if skipped_steps(self.deepspeed) == self._seen:
            self.in_a_row = 0
            self._copy(self._buffers, self._kept)
            return False
        self._seen = skipped_steps(self.deepspeed)
        self.in_a_row += 1
        self._copy(self._kept, self._buffers)
        seen = gather_from_ranks([(float(loss), files) for loss, files in micro_batches])
        at_fault = [
            (rank, files) for rank, some in enumerate(seen) for loss, files in some if not math.isfinite(loss)
        ]
        names = "; ".join(f"rank {rank}: {', '.join(files)}" for rank, files in at_fault)
        if len(at_fault) == sum(map(len, seen)):
            names += " (all of the step: the weights may be at fault, not the images)"
        reason = (
            f"the loss is not finite for these images: {names}"
            if names
            else "the losses are finite, the gradient is not"
        )
        is_main = dist.get_rank() == 0
        if is_main:
            ranks = [[{"loss": str(loss), "images": files} for loss, files in some] for some in seen]
            self._lines.add(json.dumps({"step": step, "ranks": ranks}) + "\n")
        if self.in_a_row >= self.limit:
            raise Diverged(
                f"{counted(self.in_a_row, 'step')} in a row, up to step {step}, "
                f"{'was' if self.in_a_row == 1 else 'were'} skipped; at the last {reason}. {self.file} names the "
                "images of all of them. Lower the learning rate, or clip the gradients with "
                "optimizer_config=dict(grad_clip=dict(max_norm=...))"
            )
        if is_main:
            log.warning("step %d is skipped (%d in a row): %s", step, self.in_a_row, reason)
        return True

    def at_end(self, steps: int) -> None:
        """Raises Diverged, on every rank, when each of the training's `steps` was skipped, fewer than the
        limit though they are."""
        if self.in_a_row and self.in_a_row == steps:
            raise Diverged(
                f"every step of this training ({steps}) was skipped, so it changed no weight; {self.file} "
                "names their images; look at "
                "these, start from other weights, or lower the learning rate"
            )

    def _copy(self, source: list[Tensor], target: list[Tensor]) -> None:
        if source:  # not every model has batch norms
            copy_tensors(source, target)
