"""Which rank keeps the others waiting, how much of their time that costs, and why: data that come late, or
layers that compute slowly. And whether all of them wait for data.

In synchronous training all ranks take the same time for a step, so step times tell nothing. Compared are the
parts that are a rank's own: its waiting for data, and the time inside the forwards of its layers, whose
weights are there by then, measured in one step per log record.
"""

import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from internseg_ds.distributed.process_group import gather_from_ranks
from internseg_ds.models.activation_checkpointing import runs_compiled
from internseg_ds.torch_internals import BATCH_NORM

log = logging.getLogger(__name__)

# both assumed: below them a fix would gain less than the noise between two records
NOTABLE = 0.15
"""Share of the others' time from which a slow rank is named."""
STARVING = 0.10
"""Share of their time that all ranks wait for data from which the fix is named."""


def _timed(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with parameters in a module, and compiled blocks as a whole."""
    if runs_compiled(module):
        yield module
        return
    yield from (layer for child in module.children() for layer in _timed(child))
    is_layer = next(module.children(), None) is None and next(module.parameters(), None) is not None
    if is_layer and not isinstance(module, BATCH_NORM):  # which may wait for other ranks' moments
        yield module


class LayerClock:
    """A `with` block that adds up the time that layers with parameters, and compiled blocks, take in their
    forward passes, recomputation included: on a GPU by its own events."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.layers = list(dict.fromkeys(_timed(module)))
        self.on_gpu = device.type == "cuda"
        self._began: dict[nn.Module, Any] = {}
        self._spans: list[tuple[Any, Any]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "LayerClock":
        self._spans = []
        # after ZeRO-3's own hooks, which gather a layer's weights before its forward
        self._hooks = [
            hook
            for layer in self.layers
            for hook in (
                layer.register_forward_pre_hook(self._start),
                layer.register_forward_hook(self._stop),
            )
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def seconds(self) -> float:
        """What the last block took. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(stop) for start, stop in self._spans) / 1000
        return sum(stop - start for start, stop in self._spans)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self, layer: nn.Module, _: Any) -> None:
        self._began[layer] = self._now()

    def _stop(self, layer: nn.Module, _: Any, __: Any) -> None:
        self._spans.append((self._began.pop(layer), self._now()))


class Stragglers:
    """Looks at each log record for a rank that keeps the others waiting; twice in a row, the log names it.
    And once a run, that the data come late on all."""

    def __init__(self, workers: int) -> None:
        """workers: processes that decode data for each rank. Collective."""
        self.workers = workers
        self._hosts = gather_from_ranks(socket.gethostname())
        self._last: Straggler | None = None
        self._starved = False
        self._logged = False

    def values(self, ranks: Sequence[Sequence[float]], step_s: float) -> dict[str, float]:
        """For a log record: "waits_for_slowest", the share of their time that ranks wait for the slowest;
        nothing where there is one rank. ranks: of each, the seconds a step that it waited for data, and those of its
        LayerClock. step_s: seconds a step."""
        data_s, layers_s = zip(*ranks, strict=True)
        self._see_data(statistics.median_low(data_s) / step_s)
        if len(ranks) == 1:
            return {}
        before = self._last
        found = slowest(data_s, layers_s, step_s, self._hosts)
        self._last = found
        if (
            before is not None
            and (before.rank, before.cause) == (found.rank, found.cause)
            and min(before.share, found.share) > NOTABLE
        ):
            log.info("straggler: %s", found.text)
        return {"waits_for_slowest": found.share}

    def _see_data(self, share: float) -> None:
        """Logs once that ranks wait for data, when two records in a row say so. share: of its time, that the
        median rank waits."""
        before = self._starved
        self._starved = share > STARVING
        if self._starved and before and not self._logged:
            self._logged = True
            log.info(
                "the training waits for data %.0f %% of the time: raise data.workers_per_gpu, which is %d, "
                "if the host has cores to spare, "
                "or speed up the pipeline or the disk",
                100 * share,
                self.workers,
            )


@dataclass(frozen=True)
class Straggler:
    """The slowest rank. share: of the other ranks' time, that they wait for it. text: for the log."""

    rank: int
    cause: Literal["data", "layers"]
    share: float
    text: str


def slowest(
    data_s: Sequence[float], layers_s: Sequence[float], step_s: float, hosts: Sequence[str]
) -> Straggler:
    """The rank that is worst against the median of all: by data, the difference over the step; by its layers,
    1 - median / own, which is how long the others wait at most.

    data_s: of each rank, the seconds a step that it waited for data; layers_s: the seconds that its layers took
    in the measured step. step_s: seconds a step.
    """
    late = max(range(len(data_s)), key=data_s.__getitem__)
    slow = max(range(len(layers_s)), key=layers_s.__getitem__)
    usual_wait = statistics.median_low(data_s)
    usual_layers = statistics.median_low(layers_s)
    by_data = (data_s[late] - usual_wait) / step_s
    by_layers = 1 - usual_layers / layers_s[slow] if layers_s[slow] > 0 else 0.0
    if by_data >= by_layers:
        return Straggler(
            late,
            "data",
            by_data,
            f"rank {late} (host {hosts[late]}) waits {data_s[late]:.2f} s a step for data "
            f"where the median rank waits {usual_wait:.2f} s; "
            f"the others wait for it {100 * by_data:.0f} % of the time",
        )
    return Straggler(
        slow,
        "layers",
        by_layers,
        f"rank {slow} (host {hosts[slow]}) computes {layers_s[slow] / usual_layers:.2f} times as long "
        f"as the median rank; the others wait for it up to {100 * by_layers:.0f} % of the time",
    )
