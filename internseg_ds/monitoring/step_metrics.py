"""Metrics of the steps between two log records: loss terms, gradient norms, and where the time went.

Losses are kept on the device, so that adding them never waits for it.
"""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

# assumed, with no measurement behind them: noise of a training stays far below, a loss that diverges far above
SPIKE = 10.0
"""A loss is a spike when it lies this many median absolute deviations over the median of the steps before, and
half as high again."""
LEAST_STEPS = 20
"""Steps that must have gone before to call one a spike."""


class StepMetrics:
    """Sums of loss terms, the loss and gradient norm of each step, and seconds, since the last record. Loss
    terms are scalars on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """Of each term over micro-batches with a finite loss, float32."""
        self.losses: list[Tensor] = []
        """Of each step: the mean over its micro-batches."""
        self.grad_norms: list[Tensor | float] = []
        """Of each step that was not skipped."""
        self.waited_s = 0.0
        """Seconds that the loop waited for data."""
        self.micro_batches = 0
        self._step: list[Tensor] = []
        """Losses of the micro-batches of the step that is not over."""
        self._finite: list[Tensor] = []
        """Of each micro-batch: whether its loss is finite."""
        self._spent_s = 0.0
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds spent on training since the start: what lies inside `paused` (saving, evaluating) left
        out."""
        return self._spent_s + time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What lies inside is no training."""
        self._spent_s = self.seconds
        yield
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What lies inside is waiting for data."""
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds the terms of one micro-batch, "loss" and others; the means leave it out when its loss is not
        finite."""
        finite = losses["loss"].detach().isfinite()
        self._finite.append(finite)
        for name, value in losses.items():
            term = value.detach().float().masked_fill(~finite, 0.0)
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        self._step.append(losses["loss"].detach().float())
        self.micro_batches += 1

    def end_step(self, grad_norm: Tensor | float | None) -> None:
        """The micro-batches since the last call made one optimizer step. grad_norm: before clipping, None of a
        step that was skipped."""
        self.losses.append(torch.stack(self._step).mean())
        self._step = []
        if grad_norm is not None:
            self.grad_norms.append(grad_norm)

    def means_over_ranks(
        self, own: Sequence[float] = ()
    ) -> tuple[dict[str, float], list[float], list[list[float]]]:
        """Gives (means of the terms over micro-batches and ranks, the loss of each step as a mean over ranks, the
        `own` of each rank). Collective: one all-reduce, and one transfer from the device.

        own: numbers of this rank, as many on each; they come back in fp32.
        """
        names = sorted(self.sums)
        finite_here = torch.stack(self._finite).float().sum()
        stacked = torch.stack([finite_here, *(self.sums[name] for name in names), *self.losses])
        table = _in_own_row(own, stacked.device)
        shared = torch.cat([stacked, table])
        dist.all_reduce(shared)
        stacked, table = shared[: stacked.numel()], shared[stacked.numel() :]
        terms, losses = stacked[: len(names) + 1], stacked[len(names) + 1 :] / dist.get_world_size()
        # the norms are the same on all ranks
        there = [norm for norm in self.grad_norms if _lies_on(norm, stacked.device)]
        norms = [float(norm) for norm in self.grad_norms if not _lies_on(norm, stacked.device)]
        parts = [terms, losses, table, *(norm.float().view(1) for norm in there)]
        together = torch.cat(parts).cpu().tolist()
        finite, *sums = together[: len(terms)]
        before_table = len(terms) + len(losses)
        after_table = before_table + len(table)
        norms += together[after_table:]
        means = {
            name: value / finite if finite else math.nan for name, value in zip(names, sums, strict=True)
        }
        means["grad_norm"] = statistics.fmean(norms) if norms else math.nan
        means["grad_norm_max"] = max(norms, default=math.nan)
        of_ranks = [
            together[first : first + len(own)] for first in range(before_table, after_table, len(own) or 1)
        ]
        return means, together[len(terms) : before_table], of_ranks


def _in_own_row(own: Sequence[float], device: torch.device) -> Tensor:
    """A flat table of a row for each rank, on the device: zeros, and `own` in this rank's, so that the sum over ranks
    has all rows. It is filled there, since a copy from the host would wait for the GPU."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    before, after = (torch.zeros(len(own) * count, device=device) for count in (rank, ranks - rank - 1))
    return torch.cat([before, *(torch.full((1,), float(value), device=device) for value in own), after])


def _lies_on(value: Tensor | float, device: torch.device) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.device == device


class Spikes:
    """Losses of single steps that stand out from those before them."""

    def __init__(self, remembered: int = 200) -> None:
        self.before: deque[float] = deque(maxlen=remembered)

    def among(self, losses: Sequence[float], last: int) -> dict[str, float]:
        """For a log record: "loss_spikes", how many of these losses stand out, if any; the log names them.
        last: the step of the last one.

        Losses that are not finite are left out: those steps were skipped.
        """
        found = 0
        for step, loss in enumerate(losses, last - len(losses) + 1):
            if not math.isfinite(loss):
                continue
            if len(self.before) >= LEAST_STEPS:
                median = statistics.median(self.before)
                spread = statistics.median(abs(value - median) for value in self.before)
                if loss > max(median + SPIKE * spread, 1.5 * median):
                    found += 1
                    log.info(
                        "step %d: the loss of %.4g is a spike; the median of the %d steps before is %.4g",
                        step,
                        loss,
                        len(self.before),
                        median,
                    )
            self.before.append(loss)
        return {"loss_spikes": found} if found else {}
