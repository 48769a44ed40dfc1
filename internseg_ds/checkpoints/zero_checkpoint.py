"""One logical view of a ZeRO checkpoint directory: parameter name -> whole fp32 master value, whatever the stage and number of processes.

In: a directory that DeepSpeed's `save_checkpoint` wrote under ZeRO-1, 2 or 3. Out: tensors, or slices of them, read from where they lie in the shards
(`stored`), so that no rank's file is ever in memory whole. Does not load DeepSpeed: its own `zero_to_fp32` imports it, unpickles whatever the file
asks for, and holds the whole model in memory for ZeRO-1/2 and for one-file output.

Layout (deepspeed 0.19.8): a rank's `*_optim_states.pt` holds flat fp32 partitions, one a group. ZeRO-1/2: a group's parameters end to end, padded, cut
into world-size equal parts. ZeRO-3: of each parameter ceil(numel / world size) elements per rank, end to end in the order of `param_shapes`. AdamW's
moments lie the same way, in `base_optimizer_state` (ZeRO-1/2) or `optimizer_state_dict` (ZeRO-3), numbered like the flat partitions. Frozen parameters
are in the model_states: as fragments of every rank (ZeRO-3), whole (ZeRO-2), or only in the module's own state dict, unlisted (ZeRO-1, where
`zero_to_fp32` leaves them out). ZeRO-1 in bf16 with fp32 gradients is another optimizer of DeepSpeed's, whose files do not say their stage.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internseg_ds.checkpoints.manifest import MANIFEST, checked_files, read_manifest, verify_manifest
from internseg_ds.checkpoints.saves import named_by
from internseg_ds.checkpoints.stored import Stored, load_stored
from internseg_ds.errors import CheckpointError

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00")
What = Literal["fp32", "exp_avg", "exp_avg_sq", "ema"]
EMA_FILE = "zero_pp_rank_{rank}_mp_rank_00_ema_states.pt"
"""What a rank of this engine calls its shard of the averaged weights; it lies as the fp32 masters do."""
TOGETHER = (
    "it was saved with checkpoint.use_node_local_storage, each host's files in its own folder: copy the folders of all hosts together into one, "
    "or, to train on, start on the same hosts in the same order"
)


class ZeroCheckpoint:
    """A ZeRO checkpoint directory, opened for reading.

    Attributes: path, stage, world_size, manifest (this engine's note, or {}), shapes (name -> torch.Size of every parameter, frozen ones too),
    buffers (name -> Tensor), client_state; trained (names), steps and samples (of the engine, skipped ones too), scheduled (steps of the learning-rate
    schedule), updates (of AdamW), has_ema; ranks (whose files are here: all of them, unless `partial`).
    """

    def __init__(self, path: Path, *, partial: bool = False, check: bool = True) -> None:
        """path: the directory of one save. partial: where each host wrote into a folder of its own (node-local storage), this host's files will do;
        its processes can read what they themselves saved. check: whatever is read, now and later, is held against the
        checksums of the save. Raises CheckpointError when files are missing, damaged, or from different runs."""
        self.path = path
        if path.name.endswith(".partial"):
            raise CheckpointError(f"the save of {path} did not finish; take another checkpoint")
        self.manifest: dict[str, Any] = read_manifest(path) or {}
        verify_manifest(path)
        checked = checked_files(path, self.manifest) if check else {}
        partial = partial and self.manifest.get("node_local", False)
        again = advice(self.manifest)
        by_rank = _by_rank(path, "optim_states", partial, again)
        self.ranks, files = tuple(by_rank), list(by_rank.values())
        shards = [_optimizer_state(file, load_stored(file, checked.get(file.name))) for file in files]
        self.stage, self.world_size = _layout(shards[0])
        for file, shard in zip(files, shards):
            stage, written_by = _layout(shard)
            if (stage, written_by) != (self.stage, self.world_size) or len(files) > self.world_size:
                raise CheckpointError(
                    f"{path} mixes runs: {file.name} was saved by {written_by} processes under ZeRO-{stage}, "
                    f"but there are {len(files)} such files and {files[0].name} was saved by {self.world_size} "
                    f"under ZeRO-{self.stage}; copy the checkpoint again, with all its files"
                )
        if len(files) < self.world_size and not partial:
            raise CheckpointError(
                f"{_of_rank(files[0], len(files))} is missing: {files[0].name} was saved by {self.world_size} processes; {again}"
            )
        _same(path, "optimizer step", {file: _step(shard) for file, shard in zip(files, shards)})
        model_files = list(_by_rank(path, "model_states", partial, again).values())
        if len(model_files) != (len(files) if self.stage == 3 else 1):
            raise CheckpointError(
                f"{path} has {len(model_files)} model_states files for {len(files)} processes under ZeRO-{self.stage}"
                + (
                    f": {_of_rank(model_files[0], len(model_files)).name} is missing"
                    if len(model_files) < len(files)
                    else ""
                )
                + f"; {again}"
            )
        models = [load_stored(file, checked.get(file.name)) for file in model_files]
        for file, model in zip(model_files, models):
            if not isinstance(model, dict) or not {"module", "param_shapes", "buffer_names"} <= model.keys():
                raise CheckpointError(
                    f"{file} holds no model state of a ZeRO checkpoint; copy the checkpoint again, with all its files"
                )
        _same(path, "step", {file: model.get("global_steps") for file, model in zip(model_files, models)})
        main = models[0]
        groups = [
            {name: torch.Size(shape) for name, shape in group.items()} for group in main["param_shapes"]
        ]
        self.steps: int = int(main.get("global_steps") or 0)
        self.samples: int = int(main.get("global_samples") or 0)
        self.scheduled: int = int(
            (main.get("lr_scheduler") or {}).get(
                "last_epoch", self.steps - int(main.get("skipped_steps") or 0)
            )
        )
        self.updates: int = next((step for step in map(_step, shards) if step is not None), 0)
        self.client_state: dict[str, Any] = {
            key: value for key, value in main.items() if key == "internseg_ds"
        }
        # widened, as heads are: DeepSpeed casts buffers to bf16 unless `data_types.keep_in_fp32_modules` says otherwise
        self.buffers: dict[str, Tensor] = {
            name: _widened(main["module"][name].read()) for name in main["buffer_names"]
        }
        trained = {name: shape for group in groups for name, shape in group.items()}
        self.trained = frozenset(trained)
        self._tied: dict[str, str] = (
            dict(main.get("shared_params") or {})
            if self.stage == 3
            else _shared_memory(main["module"], trained)
        )
        if self.stage == 1:
            stored = trained.keys() | self.buffers.keys() | self._tied.keys()
            self._frozen = [
                {
                    name: value
                    for name, value in main["module"].items()
                    if name not in stored and isinstance(value, Stored)
                }
            ]
            frozen = {name: value.shape for name, value in self._frozen[0].items()}
        else:
            self._frozen = [model.get("frozen_param_fragments") or {} for model in models]
            frozen = {
                name: torch.Size(shape) for name, shape in (main.get("frozen_param_shapes") or {}).items()
            }
            if self.stage == 3:
                self._frozen = self._of_every_rank(
                    self._frozen,
                    lambda rank: {
                        name: _Elsewhere(path, rank, value.numel()) for name, value in self._frozen[0].items()
                    },
                )
        self.shapes: dict[str, torch.Size] = trained | frozen
        self.shapes |= {name: self.shapes[kept] for name, kept in self._tied.items() if kept in self.shapes}
        # per rank one long vector (ZeRO-1/2: one a group), in pieces, and for each trained parameter where it begins in it
        self._flat: dict[str, list[list[Piece]]] = {
            "fp32": [
                _as_list(shard["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"])
                for shard in shards
            ]
        }
        states = [_adam_state(shard) for shard in shards]
        for what in ("exp_avg", "exp_avg_sq"):
            self._flat[what] = [
                [state[index][what] for index in range(len(pieces))]
                if all(what in state.get(index, {}) for index in range(len(pieces)))
                else []
                for state, pieces in zip(states, self._flat["fp32"])
            ]  # all or none of a rank's, or offsets would shift
        self.has_ema = any(path.glob("*_ema_states.pt"))
        if self.has_ema:
            averages = _by_rank(path, "ema_states", partial, again)
            if len(averages) != len(files):
                raise CheckpointError(
                    f"{path} has {len(averages)} ema_states files for {len(files)} processes; {again}"
                )
            self._flat["ema"] = [
                load_stored(file, checked.get(file.name))["ema_flat_groups"] for file in averages.values()
            ]
        # ranks' partitions are equally long, but DeepSpeed saves the masters of the last one, and those alone, without the padding behind them
        lengths = [
            max(piece.numel() for piece in pieces)
            for pieces in zip(*(pieces for held in self._flat.values() for pieces in held if pieces))
        ]
        for what, held in self._flat.items():
            self._flat[what] = self._of_every_rank(
                held, lambda rank: [_Elsewhere(path, rank, length) for length in lengths]
            )
        self._computed_with = main["module"]
        self._place: dict[str, tuple[int, int]] = {}
        paddings = shards[0].get("param_alignment_paddings")
        offset = 0
        for index, group in enumerate(groups):
            offset = offset if self.stage == 3 else 0
            for position, (name, shape) in enumerate(group.items()):
                self._place[name] = (index, offset)
                offset += self._share(shape) if self.stage == 3 else shape.numel()
                if self.stage < 3 and paddings is not None:
                    offset += paddings[index][position]

    def _of_every_rank(self, held: list, elsewhere: Callable[[int], Any]) -> list:
        """What each rank has, given that of the ranks whose files are here, in their order."""
        there = dict(zip(self.ranks, held, strict=True))
        return [there[rank] if rank in there else elsewhere(rank) for rank in range(self.world_size)]

    @classmethod
    def open(cls, path: Path, tag: str | None = None, *, check: bool = True) -> "ZeroCheckpoint":
        """path: a work directory, its `checkpoints` folder, one save in it, or the file that names one. tag: which save; "best" for the best score;
        default the latest. check: as for the class."""
        return cls(find_save(path, tag), check=check)

    def read(self, name: str) -> Tensor:
        """The whole fp32 value of a parameter, a fresh tensor (frozen parameters were stored in the run's own dtype and are widened)."""
        return self.read_slice(name, 0, self.shapes[name].numel()).view(self.shapes[name])

    def read_slice(self, name: str, start: int, stop: int, what: What = "fp32") -> Tensor:
        """Elements [start, stop) of a parameter laid out flat, of its AdamW moments, or of its average (EMA): (stop - start,) fp32, a fresh
        tensor. Reads no more than these.

        This is what a rank of another number of processes, or of another stage, needs of an old checkpoint.
        Raises CheckpointError for moments that the checkpoint lacks (a frozen parameter has none), and when elements are missing.
        """
        shape = self.shapes[name]
        name = self._tied.get(name, name)
        self.check_holds(what)
        if what == "ema" and name not in self._place:
            what = "fp32"  # a frozen one is its own average
        if name not in self._place and what != "fp32":
            raise CheckpointError(f"{self.path}: {name} is frozen, so it has no {what}")
        if name in self._place and self.stage < 3:
            group, begin = self._place[name]
            parts = list(
                _slices([rank[group] for rank in self._flat[what] if rank], begin + start, begin + stop)
            )
        else:
            parts = []
            share = (
                self._share(shape) if self.stage == 3 else shape.numel()
            )  # frozen ones are whole in the only model_states file
            ranks, begin = (
                (self._flat[what], self._place[name][1])
                if name in self._place
                else ([[each[name]] for each in self._frozen], 0)
            )
            for rank, pieces in enumerate(ranks):
                first, last = max(start, rank * share), min(stop, (rank + 1) * share)
                parts += (
                    _slices(pieces, begin + first - rank * share, begin + last - rank * share)
                    if first < last
                    else []
                )
        there = sum(last - first for _, first, last in parts)
        if there != stop - start:
            raise CheckpointError(
                f"{self.path}: {name} has {there} of the {stop - start} elements of {what} wanted; the checkpoint is damaged or was saved "
                f"before the first step, take another one"
            )
        if what == "fp32" and self.stage < 3 and any(isinstance(piece, _Elsewhere) for piece, _, _ in parts):
            return _widened(
                self._computed_with[name].read_slice(start, stop)
            )  # each host has these whole: the masters, rounded to the dtype of the run
        found = torch.empty(there)
        at = 0
        for piece, first, last in parts:
            piece.read_slice_into(found[at : at + last - first], first)
            at += last - first
        return found

    def check_holds(self, what: What) -> None:
        """Raises CheckpointError when the average is asked for and there is none."""
        if what == "ema" and not self.has_ema:
            raise CheckpointError(
                f"{self.path} holds no averaged weights; train with engine.ema=0.999 to have them"
            )

    def _share(self, shape: torch.Size) -> int:
        """How many elements of a parameter each rank of ZeRO-3 holds; the last may hold padding."""
        return math.ceil(shape.numel() / self.world_size)


def is_zero_checkpoint(path: Path) -> bool:
    """Whether a path is a ZeRO checkpoint, a folder of them, or the file `latest` or `best` that names one."""
    if _is_pointer(path):
        return True
    return path.is_dir() and any(
        any(folder.glob("*_optim_states.pt")) or (folder / "latest").is_file()
        for folder in (path, path / "checkpoints")
    )


def find_save(path: Path, tag: str | None = None) -> Path:
    """The directory of one save: `path` itself, or what its `latest` (or `best`, or `tag`) names, or that file itself. Raises CheckpointError when it is
    not there."""
    path = Path(path)
    if _is_pointer(path):
        path = path.parent / named_by(path)
    if not path.is_dir():
        raise CheckpointError(
            f"there is no checkpoint directory {path}; give WORK_DIR, WORK_DIR/checkpoints or one iter_N directory"
        )
    if tag is None and (any(path.glob("*_optim_states.pt")) or (path / MANIFEST).is_file()):
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    pointer = folder / (tag if tag == "best" else "latest")
    if tag is None or tag == "best":
        if not pointer.is_file():
            raise CheckpointError(
                f"there is no {pointer}, so nothing says which checkpoint to take; give one iter_N directory, or --tag"
            )
        tag = named_by(pointer)
    if not (folder / tag).is_dir():
        there = ", ".join(sorted(item.name for item in folder.iterdir() if item.is_dir())) or "none"
        raise CheckpointError(f"there is no checkpoint {folder / tag}; there are: {there}")
    return folder / tag


def _is_pointer(path: Path) -> bool:
    return path.name in ("latest", "best") and path.is_file()


@dataclass(frozen=True)
class _Elsewhere:
    """What lies in the file of a rank of another host."""

    path: Path
    rank: int
    length: int

    def numel(self) -> int:
        return self.length

    def read_slice_into(self, out: Tensor, start: int) -> None:
        raise CheckpointError(
            f"{self.path} lacks the files of rank {self.rank}, which another host saved; {TOGETHER}"
        )


Piece = Stored | _Elsewhere


def advice(manifest: dict[str, Any]) -> str:
    """What to do where files of a save are missing."""
    return (
        TOGETHER
        if manifest.get("node_local")
        else "copy the checkpoint again, with the optim_states and model_states files of every rank"
    )


def _by_rank(path: Path, kind: str, partial: bool, again: str) -> dict[int, Path]:
    """The files of one kind by data-parallel rank, in order, none missing unless `partial`."""
    found: dict[int, Path] = {}
    for file in sorted(path.glob(f"*_{kind}.pt")):
        match = RANK.search(file.name)
        rank = int(match[1]) if match else 0
        if rank in found:
            raise CheckpointError(
                f"{path} mixes runs: {found[rank].name} and {file.name} are both of rank {rank}; remove the one that does not belong"
            )
        found[rank] = file
    if not found:
        raise CheckpointError(
            f"{path} holds no *_{kind}.pt: it is no ZeRO checkpoint, or its save did not finish ({MANIFEST} is written last)"
        )
    missing = [rank for rank in range(max(found) + 1) if rank not in found]
    if missing and not partial:
        raise CheckpointError(f"{path}: the {kind} file of rank {missing[0]} is missing; {again}")
    return dict(sorted(found.items()))


def _of_rank(file: Path, rank: int) -> Path:
    """What rank `rank` calls its file, given another rank's."""
    return file.with_name(RANK.sub(f"zero_pp_rank_{rank}_mp_rank_00", file.name))


def _optimizer_state(file: Path, content: Any) -> dict[str, Any]:
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if (
        not isinstance(state, dict)
        or "partition_count" not in state
        or not {"fp32_flat_groups", "single_partition_of_fp32_groups"} & state.keys()
    ):
        raise CheckpointError(
            f"{file} holds no optimizer state of ZeRO-1, 2 or 3; give a checkpoint that was saved under one of them"
        )
    return state


def _layout(shard: dict[str, Any]) -> tuple[int, int]:
    """Stage and number of processes that a shard was saved under. DeepSpeed's BF16_Optimizer (ZeRO-1, fp32 gradients) names no stage."""
    partitions = shard["partition_count"]
    return int(shard.get("zero_stage", 1)), int(
        max(partitions) if isinstance(partitions, (list, tuple)) else partitions
    )


def _adam_state(shard: dict[str, Any]) -> dict[int, dict[str, Any]]:
    base = shard.get("optimizer_state_dict") or shard.get("base_optimizer_state") or {}
    return base.get("state", {}) if isinstance(base, dict) else {}


def _step(shard: dict[str, Any]) -> int | None:
    """Updates that the optimizer had done, None where the shard does not say."""
    return max(
        (
            int(state["step"].read() if isinstance(state["step"], Stored) else state["step"])
            for state in _adam_state(shard).values()
            if "step" in state
        ),
        default=None,
    )


def _same(path: Path, what: str, found: dict[Path, int | None]) -> None:
    """Raises CheckpointError when files that say a step do not say the same one."""
    said = {file: step for file, step in found.items() if step is not None}
    if len(set(said.values())) > 1:
        raise CheckpointError(
            f"{path} mixes saves: {', '.join(f'{file.name} is of {what} {step}' for file, step in said.items())}; "
            f"copy the checkpoint again, with all its files"
        )


def _shared_memory(tensors: dict[str, Any], kept: Iterable[str]) -> dict[str, str]:
    """Second names of tied weights -> the name in `kept` that holds them. DeepSpeed lists only some: not those of a module that is registered twice."""
    owner = {
        tensors[name]: name for name in kept if name in tensors
    }  # stored tensors are equal when they lie at the same place
    return {
        name: owner[value]
        for name, value in tensors.items()
        if isinstance(value, Stored) and owner.get(value, name) != name
    }


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _as_list(value: Stored | list[Stored]) -> list[Stored]:
    return [value] if isinstance(value, Stored) else list(value)


def _slices(pieces: list[Piece], start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
    """Elements [start, stop) of the vector that `pieces` make end to end, as (piece, first, last) in the piece."""
    begin = 0
    for piece in pieces:
        end = begin + piece.numel()
        if begin < stop and start < end:
            yield piece, max(start - begin, 0), min(stop, end) - begin
        begin = end
