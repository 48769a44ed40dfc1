"""One logical view of a ZeRO checkpoint directory: parameter name -> whole fp32 master value, whatever the stage and number of processes.

In: a directory that DeepSpeed's `save_checkpoint` wrote under ZeRO-1, 2 or 3. Out: tensors, one at a time, read from memory-mapped shards, so that no
rank's file is ever in memory whole. Does not load DeepSpeed: its own `zero_to_fp32` imports it, unpickles whatever the file asks for, and holds the
whole model in memory for ZeRO-1/2 and for one-file output.

Layout (deepspeed 0.19.8): a rank's `*_optim_states.pt` holds flat fp32 partitions, one a group. ZeRO-1/2: a group's parameters end to end, padded, cut
into world-size equal parts. ZeRO-3: of each parameter ceil(numel / world size) elements per rank, end to end in the order of `param_shapes`.
"""

import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internseg_ds.checkpoints.manifest import MANIFEST, read_manifest, verify_manifest
from internseg_ds.errors import CheckpointError


class _StandIn:
    """Takes the place of DeepSpeed's own small classes in its files: holds what the pickle gives it and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _stand_in_enum(value: Any) -> Any:
    """DeepSpeed's enums become their plain values."""
    return value


# what DeepSpeed pickles beside tensors, numbers, strings and containers; anything else in a file is refused
ALLOWED = [
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_stand_in_enum, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def load_mapped(path: Path) -> Any:
    """`torch.load` of a file on the CPU, memory-mapped, refusing to run code. Raises CheckpointError when it is missing, damaged or not such a file."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; copy it again with all its files") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds objects that are not weights, and loading them would run code: {str(error).splitlines()[0]}") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no PyTorch file ({str(error).splitlines()[0]}); copy it again, or take another checkpoint") from None


class ZeroCheckpoint:
    """A ZeRO checkpoint directory, opened for reading.

    Attributes: path, stage, world_size, manifest (this engine's note, or {}), shapes (name -> torch.Size of every parameter, frozen ones too),
    buffers (name -> Tensor), client_state.
    """

    def __init__(self, path: Path) -> None:
        """path: the directory of one save. Raises CheckpointError when files are missing, damaged, or from different runs."""
        self.path = path
        self.manifest: dict[str, Any] = read_manifest(path) or {}
        verify_manifest(path)
        shards = [load_mapped(file)["optimizer_state_dict"] for file in _by_rank(path, "optim_states")]
        self.stage, self.world_size = int(shards[0]["zero_stage"]), len(shards)
        for rank, shard in enumerate(shards):
            written_by = shard["partition_count"]
            written_by = max(written_by) if isinstance(written_by, (list, tuple)) else written_by
            if (int(shard["zero_stage"]), int(written_by)) != (self.stage, self.world_size):
                raise CheckpointError(f"{path} mixes runs: the file of rank {rank} was saved by {written_by} processes under ZeRO-{int(shard['zero_stage'])}, "
                                      f"but there are {self.world_size} files and rank 0 has ZeRO-{self.stage}; copy the checkpoint again, with all its files")
        models = [load_mapped(file) for file in _by_rank(path, "model_states")]
        if len(models) != (self.world_size if self.stage == 3 else 1):
            raise CheckpointError(f"{path} has {len(models)} model_states files for {self.world_size} processes; copy the checkpoint again, with all its files")
        main = models[0]
        groups = [{name: torch.Size(shape) for name, shape in group.items()} for group in main["param_shapes"]]
        frozen = {name: torch.Size(shape) for name, shape in (main.get("frozen_param_shapes") or {}).items()}
        self.shapes: dict[str, torch.Size] = {name: shape for group in groups for name, shape in group.items()} | frozen
        self.buffers: dict[str, Tensor] = {name: main["module"][name] for name in main["buffer_names"]}
        self.client_state: dict[str, Any] = {key: value for key, value in main.items() if key == "internseg_ds"}
        self._frozen = [model.get("frozen_param_fragments") or {} for model in models]
        # per rank one long vector, in pieces, and for each trained parameter where it begins in it
        if self.stage == 3:
            self._flat = [_as_list(shard["fp32_flat_groups"]) for shard in shards]
        else:
            self._flat = [_as_list(shard["single_partition_of_fp32_groups"]) for shard in shards]
        self._place: dict[str, tuple[int, int]] = {}
        paddings = shards[0].get("param_alignment_paddings")
        offset = 0
        for index, group in enumerate(groups):
            offset = offset if self.stage == 3 else 0
            for position, (name, shape) in enumerate(group.items()):
                self._place[name] = (index, offset)
                offset += math.ceil(shape.numel() / self.world_size) if self.stage == 3 else shape.numel()
                if self.stage < 3 and paddings is not None:
                    offset += paddings[index][position]

    @classmethod
    def open(cls, path: Path, tag: str | None = None) -> "ZeroCheckpoint":
        """path: a work directory, its `checkpoints` folder, or one save in it. tag: which save; "best" for the best score; default the latest."""
        return cls(find_save(path, tag))

    def read(self, name: str) -> Tensor:
        """The whole fp32 value of a parameter, a fresh tensor (frozen parameters were stored in the run's own dtype and are widened)."""
        shape = self.shapes[name]
        if name not in self._place:
            parts = [fragments[name].flatten() for fragments in self._frozen]
        elif self.stage == 3:
            share, start = math.ceil(shape.numel() / self.world_size), self._place[name][1]
            parts = [part for rank in self._flat for part in _slices(rank, start, start + share)]
        else:
            group, start = self._place[name]
            parts = list(_slices([rank[group] for rank in self._flat], start, start + shape.numel()))
        whole = torch.cat(parts)[: shape.numel()]
        if whole.numel() != shape.numel():
            raise CheckpointError(f"{self.path}: {name} has {whole.numel()} of {shape.numel()} elements; the checkpoint is damaged, take another one")
        return whole.view(shape).float()


def is_zero_checkpoint(path: Path) -> bool:
    """Whether a directory is a ZeRO checkpoint, or a folder of them."""
    return path.is_dir() and any(any(folder.glob("*_optim_states.pt")) or (folder / "latest").is_file() for folder in (path, path / "checkpoints"))


def find_save(path: Path, tag: str | None = None) -> Path:
    """The directory of one save: `path` itself, or what its `latest` (or `best`, or `tag`) names. Raises CheckpointError when it is not there."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path}; give WORK_DIR, WORK_DIR/checkpoints or one iter_N directory")
    if tag is None and any(path.glob("*_optim_states.pt")):
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    pointer = folder / (tag if tag == "best" else "latest")
    if tag is None or tag == "best":
        if not pointer.is_file():
            raise CheckpointError(f"there is no {pointer}, so nothing says which checkpoint to take; give one iter_N directory, or --tag")
        tag = pointer.read_text().strip()
    if not (folder / tag).is_dir():
        there = ", ".join(sorted(item.name for item in folder.iterdir() if item.is_dir())) or "none"
        raise CheckpointError(f"there is no checkpoint {folder / tag}; there are: {there}")
    return folder / tag


def _by_rank(path: Path, kind: str) -> list[Path]:
    """The files of one kind, ordered by data-parallel rank, none missing."""
    found = {}
    for file in path.glob(f"*_{kind}.pt"):
        match = re.search(r"zero_pp_rank_(\d+)_mp_rank_00", file.name)
        found[int(match[1]) if match else 0] = file
    if not found:
        raise CheckpointError(f"{path} holds no *_{kind}.pt: it is no ZeRO checkpoint, or its save did not finish ({MANIFEST} is written last)")
    missing = [rank for rank in range(max(found) + 1) if rank not in found]
    if missing:
        raise CheckpointError(f"{path}: the {kind} file of rank {missing[0]} is missing; copy the checkpoint again, with all its files")
    return [found[rank] for rank in range(len(found))]


def _as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _slices(pieces: list[Tensor], start: int, stop: int) -> Iterator[Tensor]:
    """Elements [start, stop) of the vector that `pieces` make end to end."""
    begin = 0
    for piece in pieces:
        end = begin + piece.numel()
        if begin < stop and start < end:
            yield piece[max(start - begin, 0) : stop - begin]
        begin = end
