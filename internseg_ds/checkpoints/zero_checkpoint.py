"""One logical view of a ZeRO checkpoint directory: parameter name -> whole fp32 master weight, whatever the
stage and number of processes.

In: a directory that DeepSpeed's `save_checkpoint` wrote under ZeRO-1, 2 or 3. Out: tensors, or slices of
them, read from where they lie in the shards (`stored_tensors`), so that no rank's file is ever in memory
whole. Does not load DeepSpeed: its own `zero_to_fp32` imports it, unpickles whatever the file asks for, and
holds the whole model in memory for ZeRO-1/2 and for one-file output.

Opening has three stages: find the files (`zero_files`), read and validate them (`zero_shards`), and index
where each parameter lies in them (here).

Layout (deepspeed 0.19.8): a rank's `*_optim_states.pt` holds flat fp32 partitions, one a group. ZeRO-1/2: a
group's parameters end to end, padded, cut into world-size equal parts. ZeRO-3: of each parameter ceil(numel /
world size) elements per rank, end to end in the order of `param_shapes`. AdamW's moments lie the same way, in
`base_optimizer_state` (ZeRO-1/2) or `optimizer_state_dict` (ZeRO-3), numbered like the flat partitions.
Frozen parameters are in the model_states: as fragments of every rank (ZeRO-3), whole (ZeRO-2), or only in the
module's own state dict, unlisted (ZeRO-1, where `zero_to_fp32` leaves them out). ZeRO-1 in bf16 with fp32
gradients is another optimizer of DeepSpeed's, whose files do not say their stage.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from internseg_ds.checkpoints.manifest import checked_files, read_manifest, verify_manifest
from internseg_ds.checkpoints.stored_tensors import Stored, StoredBytes
from internseg_ds.checkpoints.zero_files import COPY_ALL_HOSTS, find_files, find_save
from internseg_ds.checkpoints.zero_shards import ModelState, ZeroShards, read_shards
from internseg_ds.errors import CheckpointError
from internseg_ds.zero_partition import share_per_rank

What = str
"""Of a parameter: its fp32 master weight ("fp32"), its exponential moving average ("ema"), or what the optimizer
keeps of each element, by the optimizer's name for it ("exp_avg")."""
T = TypeVar("T")


@dataclass(frozen=True)
class OtherHostShard:
    """A flat partition in the file of a rank that another host saved. length: in elements."""

    path: Path
    rank: int
    length: int

    def numel(self) -> int:
        return self.length

    def read_slice_into(self, out: Tensor, start: int) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(
            f"{self.path} lacks the files of rank {self.rank}, which another host saved; {COPY_ALL_HOSTS}"
        )


@dataclass(frozen=True)
class AbsentMoment:
    """In place of the flat partition of a moment that the optimizer does not keep of these elements. length: in
    elements."""

    path: Path
    moment: str
    length: int

    def numel(self) -> int:
        return self.length

    def read_slice_into(self, out: Tensor, start: int) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(
            f"{self.path} holds no {self.moment} of some elements: their optimizer keeps something else of them"
        )


Piece = Stored | StoredBytes | OtherHostShard | AbsentMoment
FlatVector = Sequence[Piece]
"""A flat vector in pieces that lie end to end."""


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a piece."""

    piece: Piece
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Place:
    """Where a trained parameter begins: at element `offset` of the flat vector of its group (ZeRO-1 and 2),
    or of that of each rank (ZeRO-3)."""

    group: int
    offset: int


class ZeroCheckpoint:
    """A ZeRO checkpoint directory, opened for reading.

    Attributes: path, stage, world_size, manifest (this engine's note, or {}), shapes (name -> torch.Size of
    every parameter, frozen ones too), buffers (name -> Tensor), client_state; trained (names), steps and
    samples (of the engine, skipped ones too), scheduled (steps of the learning-rate schedule), updates (of
    the optimizer, 0 where it does not count them), moments (names of what the optimizer keeps of each
    element; none before its first step), counts (what it keeps once, by name), has_ema; ranks (whose files
    are here: all of them, unless `partial`).
    """

    def __init__(self, path: Path, *, partial: bool = False, check: bool = True) -> None:
        """path: the directory of one save. partial: where each host wrote into a folder of its own
        (node-local storage), this host's files will do; its processes can read what they themselves saved.
        check: whatever is read, now and later, is held against the checksums of the save. Raises
        CheckpointError when files are missing, damaged, or from different runs."""
        if path.name.endswith(".partial"):
            raise CheckpointError(f"the save of {path} did not finish; take another checkpoint")
        self.path = path
        self.manifest: dict[str, Any] = read_manifest(path) or {}
        verify_manifest(path)
        checked = checked_files(path, self.manifest) if check else {}
        partial = partial and self.manifest.get("node_local", False)

        files = find_files(path, self.manifest, partial=partial)
        shards = read_shards(path, files, checked, partial=partial)
        self.stage, self.world_size, self.ranks = shards.stage, shards.world_size, shards.ranks
        self._read_counters(shards)
        self._index_parameters(shards)
        self._index_values(shards)

    def _read_counters(self, shards: ZeroShards) -> None:
        state = shards.model[0]
        self.steps = int(state.steps or 0)
        self.samples = state.samples
        self.scheduled = int(
            self.steps - state.skipped_steps if state.scheduled_steps is None else state.scheduled_steps
        )
        first = shards.optimizer[0]
        self.updates = next((shard.step for shard in shards.optimizer if shard.step is not None), 0)
        self.moments = tuple(name for name, of_groups in first.moments.items() if of_groups)
        self.counts = first.counts
        self.client_state = state.client_state

    def _index_parameters(self, shards: ZeroShards) -> None:
        """Names and shapes, and where trained parameters begin."""
        state = shards.model[0]
        trained = {name: shape for group in state.groups for name, shape in group.items()}
        self.trained = frozenset(trained)
        # to fp32, as heads compute with them: DeepSpeed casts buffers to bf16 unless
        # `data_types.keep_in_fp32_modules` says otherwise
        self.buffers: dict[str, Tensor] = {
            name: _to_fp32(state.module[name].read()) for name in state.buffer_names
        }
        self._tied = state.shared if self.stage == 3 else _shared_memory(state.module, trained)
        frozen = state.frozen_shapes
        if self.stage == 1:
            frozen = {name: value.shape for name, value in self._frozen_of_zero1(state).items()}
        self.shapes: dict[str, torch.Size] = trained | frozen
        self.shapes |= {name: self.shapes[kept] for name, kept in self._tied.items() if kept in self.shapes}
        if self.stage == 3:
            self._places = _places_in_shares(state.groups, self._share)
        else:
            self._places = _places_in_groups(state.groups, shards.optimizer[0].paddings)

    def _frozen_of_zero1(self, state: ModelState) -> dict[str, Stored]:
        """The parameters of the module that nothing else in a file of ZeRO-1 names."""
        named = self.trained | self.buffers.keys() | self._tied.keys()
        return {
            name: value
            for name, value in state.module.items()
            if name not in named and isinstance(value, Stored)
        }

    def _index_values(self, shards: ZeroShards) -> None:
        """Of each rank the flat vectors of trained parameters, and the fragments of frozen ones."""
        held: dict[What, list[list[Stored | StoredBytes | None]]] = {
            "fp32": [[*shard.master_weights] for shard in shards.optimizer]
        }
        for moment in self.moments:
            held[moment] = [shard.moments.get(moment, []) for shard in shards.optimizer]
        self.has_ema = shards.ema is not None
        if shards.ema is not None:
            held["ema"] = [[*of_rank] for of_rank in shards.ema]
        lengths = _partition_lengths(held.values())
        flat: dict[What, list[FlatVector]] = {
            what: [
                [
                    AbsentMoment(self.path, what, length) if piece is None else piece
                    for piece, length in zip(vector, lengths)
                ]
                for vector in vectors
            ]
            for what, vectors in held.items()
        }
        self._flat: dict[What, list[FlatVector]] = {
            what: self._of_every_rank(
                vectors, lambda rank: [OtherHostShard(self.path, rank, length) for length in lengths]
            )
            for what, vectors in flat.items()
        }
        self._module = shards.model[0].module
        fragments = [state.frozen_fragments for state in shards.model]
        self._frozen: list[Mapping[str, Piece]] = [*fragments]
        if self.stage == 1:
            self._frozen = [self._frozen_of_zero1(shards.model[0])]
        elif self.stage == 3:
            self._frozen = self._of_every_rank(
                fragments,
                lambda rank: {
                    name: OtherHostShard(self.path, rank, value.numel())
                    for name, value in fragments[0].items()
                },
            )

    def _of_every_rank(self, held: Sequence[T], elsewhere: Callable[[int], Any]) -> list[Any]:
        """What each rank has, given what those have whose files are here, in the order of `self.ranks`."""
        here = dict(zip(self.ranks, held, strict=True))
        return [here[rank] if rank in here else elsewhere(rank) for rank in range(self.world_size)]

    @classmethod
    def open(cls, path: Path, tag: str | None = None, *, check: bool = True) -> "ZeroCheckpoint":
        """path: a work directory, its `checkpoints` folder, one save in it, or the file that names one. tag:
        which save; "best" for the best score; default the latest. check: as for the class."""
        return cls(find_save(path, tag), check=check)

    def read(self, name: str) -> Tensor:
        """The whole fp32 value of a parameter, in its own shape, a fresh tensor. Frozen parameters are in the
        file in the dtype that the run computed in, and are cast."""
        return self.read_slice(name, 0, self.shapes[name].numel()).view(self.shapes[name])

    def read_slice(self, name: str, start: int, stop: int, what: What = "fp32") -> Tensor:
        """Elements [start, stop) of a parameter laid out flat, of one of its moments, or of its average (EMA):
        (stop - start,) float32, a fresh tensor. Reads no more than these.

        This is what a rank of another number of processes, or of another stage, needs of an old checkpoint.
        Raises CheckpointError for moments that the checkpoint lacks (a frozen parameter has none), and when
        elements are missing.
        """
        name = self._tied.get(name, name)
        self.check_holds(what)
        if name not in self._places:
            if what not in ("fp32", "ema"):
                raise CheckpointError(f"{self.path}: {name} is frozen, so it has no {what}")
            what = "fp32"  # a frozen parameter is its own average
        spans = list(self._spans(name, start, stop, what))
        found = sum(span.length for span in spans)
        if found != stop - start:
            raise CheckpointError(
                f"{self.path}: {name} has {found} of the {stop - start} elements of {what} wanted; the "
                "checkpoint is damaged or was saved before the first step, take another one"
            )
        elsewhere = any(isinstance(span.piece, OtherHostShard) for span in spans)
        if elsewhere and what == "fp32" and self.stage < 3:
            # each host has the whole module: the master weights, rounded to the dtype of the run
            return _to_fp32(self._module[name].read_slice(start, stop))
        return _read_spans(spans)

    def moments_of(self, name: str) -> tuple[str, ...]:
        """Which of the moments the optimizer keeps of a trained parameter."""
        name = self._tied.get(name, name)
        size = self.shapes[name].numel()
        return tuple(
            moment
            for moment in self.moments
            if not any(isinstance(span.piece, AbsentMoment) for span in self._spans(name, 0, size, moment))
        )

    def check_holds(self, what: What) -> None:
        """Raises CheckpointError when the average is asked for and there is none."""
        if what == "ema" and not self.has_ema:
            raise CheckpointError(
                f"{self.path} holds no averaged weights; train with engine.ema=0.999 to have them"
            )

    def _spans(self, name: str, start: int, stop: int, what: What) -> Iterator[Span]:
        """Where elements [start, stop) of a parameter lie; fewer elements where some are missing."""
        share = self._share(self.shapes[name])
        if name not in self._places:
            fragments = [[rank[name]] for rank in self._frozen]
            return (
                _spans_in_shares(fragments, 0, share, start, stop)
                if self.stage == 3
                else _spans_end_to_end(fragments[0], start, stop)
            )
        place, vectors = self._places[name], self._flat[what]
        if self.stage == 3:
            return _spans_in_shares(vectors, place.offset, share, start, stop)
        whole_group = [vector[place.group] for vector in vectors if vector]
        return _spans_end_to_end(whole_group, place.offset + start, place.offset + stop)

    def _share(self, shape: torch.Size) -> int:
        """How many elements of a parameter each rank of ZeRO-3 holds; the last may hold padding."""
        return share_per_rank(shape.numel(), self.world_size)


def _places_in_shares(
    groups: Iterable[Mapping[str, torch.Size]], share: Callable[[torch.Size], int]
) -> dict[str, Place]:
    """Under ZeRO-3, a rank's shares of all parameters lie end to end, those of all groups."""
    places, offset = {}, 0
    for index, group in enumerate(groups):
        for name, shape in group.items():
            places[name] = Place(index, offset)
            offset += share(shape)
    return places


def _places_in_groups(
    groups: Iterable[Mapping[str, torch.Size]], paddings: Sequence[Sequence[int]] | None
) -> dict[str, Place]:
    """Under ZeRO-1 and 2, a group's parameters lie end to end. paddings: elements behind each parameter of
    each group."""
    places = {}
    for index, group in enumerate(groups):
        offset = 0
        for position, (name, shape) in enumerate(group.items()):
            places[name] = Place(index, offset)
            offset += shape.numel() + (paddings[index][position] if paddings is not None else 0)
    return places


def _partition_lengths(flat: Iterable[Sequence[Sequence[Piece | None]]]) -> list[int]:
    """Elements of a rank's partition of each group. Ranks' partitions are equally long, but DeepSpeed saves
    the master weights of the last rank, and those alone, without the padding behind them."""
    vectors = [vector for of_ranks in flat for vector in of_ranks if vector]
    return [max(piece.numel() for piece in pieces if piece is not None) for pieces in zip(*vectors)]


def _spans_end_to_end(pieces: FlatVector, start: int, stop: int) -> Iterator[Span]:
    """Elements [start, stop) of the vector that the pieces make."""
    begin = 0
    for piece in pieces:
        end = begin + piece.numel()
        if begin < stop and start < end:
            yield Span(piece, max(start - begin, 0), min(stop, end) - begin)
        begin = end


def _spans_in_shares(
    vectors: Iterable[FlatVector], offset: int, share: int, start: int, stop: int
) -> Iterator[Span]:
    """Elements [start, stop) of a parameter of which rank r has [r * share, (r + 1) * share), from element
    `offset` of its vector on."""
    for rank, vector in enumerate(vectors):
        begin = rank * share
        first, last = max(start, begin), min(stop, begin + share)
        if first < last:
            yield from _spans_end_to_end(vector, offset + first - begin, offset + last - begin)


def _read_spans(spans: Iterable[Span]) -> Tensor:
    """(elements of all spans,) float32."""
    spans = list(spans)
    values = torch.empty(sum(span.length for span in spans))
    at = 0
    for span in spans:
        span.piece.read_slice_into(values[at : at + span.length], span.start)
        at += span.length
    return values


def _shared_memory(module: Mapping[str, Any], kept: Iterable[str]) -> dict[str, str]:
    """Second names of tied weights -> the name in `kept` that holds them. DeepSpeed lists only some: not
    those of a module that is registered twice."""
    # tensors in a file are equal when they lie at the same place
    owner = {module[name]: name for name in kept if name in module}
    return {
        name: owner[value]
        for name, value in module.items()
        if isinstance(value, Stored) and owner.get(value, name) != name
    }


def _to_fp32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
