"""Whole matrices for an optimizer whose tensors are ZeRO's flat parts of them.

In: a flat tensor of this rank in which parts of matrices lie. Out: the same tensor, in which each matrix was
replaced by a function of it. Each matrix that is in parts is put together on one of the ranks that have a part, which
sends back the parts of the result: a rank sends and receives its own elements twice, and no other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internseg_ds.distributed.zero_internals import Fragment, fp32_partitions, fragment_of
from internseg_ds.zero_partition import full_shape


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of a flattened matrix, which `rank` has from element `offset` of its flat tensor
    on."""

    rank: int
    offset: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def in_flat(self) -> slice:
        return slice(self.offset, self.offset + self.length)


@dataclass(frozen=True)
class Matrix:
    """parts: of all ranks that have one, in the order of their elements."""

    rows: int
    columns: int
    parts: tuple[Part, ...]

    @property
    def operations(self) -> int:
        """What a product of the matrix with itself takes, but for a factor."""
        return self.rows * self.columns * min(self.rows, self.columns)


class MatrixExchange:
    """Which parts of the matrices of one flat tensor this rank sends where, planned once."""

    def __init__(self, matrices: Sequence[Matrix], rank: int, world_size: int) -> None:
        """matrices: the same on every rank, in the same order."""
        owners = owners_of(matrices, world_size)
        self._whole = [
            matrix for matrix in matrices if len(matrix.parts) == 1 and matrix.parts[0].rank == rank
        ]
        divided = [
            (matrix, owner) for matrix, owner in zip(matrices, owners, strict=True) if len(matrix.parts) > 1
        ]
        self._any_divided = bool(divided)
        self._owned = [matrix for matrix, owner in divided if owner == rank]
        self._sent: list[list[Part]] = [[] for _ in range(world_size)]
        self._received: list[list[Part]] = [[] for _ in range(world_size)]
        for matrix, owner in divided:
            for part in matrix.parts:
                if part.rank == rank:
                    self._sent[owner].append(part)
                if owner == rank:
                    self._received[part.rank].append(part)

    def replace(self, flat: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces each matrix by function(matrix). Collective where a matrix is divided.

        flat: (n,), as the matrices were described. function: (rows, columns) to the same shape.
        """
        for matrix in self._whole:
            values = flat[matrix.parts[0].in_flat]
            values.copy_(function(values.view(matrix.rows, matrix.columns)).flatten())
        if not self._any_divided:
            return
        outgoing = torch.cat([flat.new_empty(0), *(flat[part.in_flat] for part in _all(self._sent))])
        gathered = flat.new_empty(sum(_lengths(self._received)))
        _all_to_all(gathered, outgoing, self._sent, self._received)
        values_of = dict(zip(_all(self._received), gathered.split(_lengths(self._received)), strict=True))
        for matrix in self._owned:
            whole = torch.cat([values_of[part] for part in matrix.parts])
            result = function(whole.view(matrix.rows, matrix.columns)).flatten()
            for part in matrix.parts:
                values_of[part].copy_(result[part.start : part.stop])
        _all_to_all(outgoing, gathered, self._received, self._sent)
        for part, values in zip(_all(self._sent), outgoing.split(_lengths(self._sent)), strict=True):
            flat[part.in_flat] = values


def owners_of(matrices: Sequence[Matrix], world_size: int) -> list[int]:
    """The rank that computes with each matrix: of those that have a part, one that has least to do."""
    load = [0] * world_size
    for matrix in matrices:
        if len(matrix.parts) == 1:
            load[matrix.parts[0].rank] += matrix.operations
    owners = []
    for matrix in matrices:
        owner = min((part.rank for part in matrix.parts), key=load.__getitem__)
        if len(matrix.parts) > 1:
            load[owner] += matrix.operations
        owners.append(owner)
    return owners


def exchanges(engine: Any, params: Sequence[nn.Parameter]) -> dict[Tensor, MatrixExchange]:
    """The exchange of each flat tensor that has matrices. Collective.

    engine: DeepSpeed's, initialised. params: the matrices, in the same order on every rank.
    """
    fragments: list[list[Fragment | None]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(fragments, [fragment_of(engine, param) for param in params])
    found: dict[int, list[Matrix]] = {}
    for param, of_ranks in zip(params, zip(*fragments, strict=True), strict=True):
        held = [(rank, each) for rank, each in enumerate(of_ranks) if each and each.start < each.stop]
        rows, columns = full_shape(param)
        parts = tuple(Part(rank, each.offset, each.start, each.stop) for rank, each in held)
        found.setdefault(held[0][1].partition, []).append(Matrix(rows, columns, parts))
    partitions = fp32_partitions(engine)
    return {
        partitions[number]: MatrixExchange(matrices, dist.get_rank(), dist.get_world_size())
        for number, matrices in found.items()
    }


def _all(parts: Iterable[Sequence[Part]]) -> list[Part]:
    return [part for of_rank in parts for part in of_rank]


def _lengths(parts: Iterable[Sequence[Part]]) -> list[int]:
    return [part.length for part in _all(parts)]


def _all_to_all(
    result: Tensor, values: Tensor, sent: Sequence[Sequence[Part]], received: Sequence[Sequence[Part]]
) -> None:
    """values: the elements of `sent`, rank after rank. result: gets those of `received`."""
    to = [sum(part.length for part in parts) for parts in sent]
    of = [sum(part.length for part in parts) for parts in received]
    dist.all_to_all_single(result, values, output_split_sizes=of, input_split_sizes=to)
