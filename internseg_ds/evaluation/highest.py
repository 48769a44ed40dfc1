"""The few highest of many, each seen by one rank: the best images of an evaluation, say."""

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

from internseg_ds.distributed.process_group import gather_from_ranks

T = TypeVar("T")
Place = tuple[float, int]
"""Order, and number with its sign turned: of equal orders the lower number is the higher."""


class Highest(Generic[T]):
    """Keeps something of the `count` items of this rank with the highest orders."""

    def __init__(self, count: int) -> None:
        self.count = count
        # a heap's least is its first, so the one that is dropped; no two have one number, so nothing else is compared
        self._heap: list[tuple[float, int, T]] = []

    def offer(self, order: float, number: int, kept: Callable[[], T]) -> None:
        """kept: makes what is kept of this item, where it is."""
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, (order, -number, kept()))
        elif self._heap and (order, -number) > self._heap[0][:2]:
            heapq.heapreplace(self._heap, (order, -number, kept()))

    def own(self) -> dict[Place, T]:
        """What this rank keeps."""
        return {(order, place): kept for order, place, kept in self._heap}

    def of_all_ranks(self) -> list[Place]:
        """The `count` highest of all ranks, from the highest. Collective."""
        by_rank = gather_from_ranks(list(self.own()))
        return sorted((place for places in by_rank for place in places), reverse=True)[: self.count]
