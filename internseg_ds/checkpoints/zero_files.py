"""The files of a ZeRO checkpoint: which save a path means, and which file of it belongs to which rank.

In: a path that a user gave. Out: the directory of one save (`find_save`), and its files by data-parallel rank
(`find_files`). Looks at names only and opens no tensor file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internseg_ds.checkpoints.manifest import MANIFEST
from internseg_ds.checkpoints.saves import named_by
from internseg_ds.errors import CheckpointError

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00")
EMA_FILE = "zero_pp_rank_{rank}_mp_rank_00_ema_states.pt"
"""What a rank of this engine calls its shard of the averaged weights."""
COPY_AGAIN = "copy the checkpoint again, with the optim_states and model_states files of every rank"
COPY_ALL_HOSTS = (
    "it was saved with checkpoint.use_node_local_storage, each host's files in its own folder: copy the "
    "folders of all hosts together into one, or, to train on, start on the same hosts in the same order"
)


@dataclass(frozen=True)
class ZeroFiles:
    """The files of one save by data-parallel rank, in the order of the ranks. ema_states: empty where the run
    kept no average. advice: what to do where one is missing."""

    optim_states: Mapping[int, Path]
    model_states: Mapping[int, Path]
    ema_states: Mapping[int, Path]
    advice: str


def find_files(path: Path, manifest: Mapping[str, Any], *, partial: bool) -> ZeroFiles:
    """The files in the directory of one save. partial: some ranks' files may be missing, since other hosts
    keep them.

    Raises CheckpointError where one that should be here is missing, and where two are of one rank.
    """
    advice = missing_file_advice(manifest)
    has_ema = any(path.glob("*_ema_states.pt"))
    return ZeroFiles(
        optim_states=_files_by_rank(path, "optim_states", partial, advice),
        model_states=_files_by_rank(path, "model_states", partial, advice),
        ema_states=_files_by_rank(path, "ema_states", partial, advice) if has_ema else {},
        advice=advice,
    )


def missing_file_advice(manifest: Mapping[str, Any]) -> str:
    """What to do where files of a save are missing."""
    return COPY_ALL_HOSTS if manifest.get("node_local") else COPY_AGAIN


def file_of_rank(file: Path, rank: int) -> Path:
    """What rank `rank` calls its file, given another rank's."""
    return file.with_name(RANK.sub(f"zero_pp_rank_{rank}_mp_rank_00", file.name))


def _files_by_rank(path: Path, kind: str, partial: bool, advice: str) -> dict[int, Path]:
    """The files of one kind. Files without a rank in their names (the model states of ZeRO-1 and 2) count as
    rank 0's."""
    found: dict[int, Path] = {}
    for file in sorted(path.glob(f"*_{kind}.pt")):
        match = RANK.search(file.name)
        rank = int(match[1]) if match else 0
        if rank in found:
            raise CheckpointError(
                f"{path} mixes runs: {found[rank].name} and {file.name} are both of rank {rank}; remove "
                "the one that does not belong"
            )
        found[rank] = file
    if not found:
        raise CheckpointError(
            f"{path} holds no *_{kind}.pt: it is no ZeRO checkpoint, or its save did not finish "
            f"({MANIFEST} is written last)"
        )
    missing = [rank for rank in range(max(found) + 1) if rank not in found]
    if missing and not partial:
        raise CheckpointError(f"{path}: the {kind} file of rank {missing[0]} is missing; {advice}")
    return dict(sorted(found.items()))


def is_zero_checkpoint(path: Path) -> bool:
    """Whether a path is a ZeRO checkpoint, a folder of them, or the file `latest` or `best` that names
    one."""
    if _is_pointer(path):
        return True
    return path.is_dir() and any(
        _has_shards(folder) or (folder / "latest").is_file() for folder in (path, path / "checkpoints")
    )


def find_save(path: Path, tag: str | None = None) -> Path:
    """The directory of one save. path: that directory, the file `latest` or `best` that names it, a work
    directory, or its `checkpoints` folder. tag: "best" or the name of a save; default the latest.

    Raises CheckpointError when it is not there.
    """
    path = Path(path)
    if _is_pointer(path):
        path = path.parent / named_by(path)
    if not path.is_dir():
        raise CheckpointError(
            f"there is no checkpoint directory {path}; give WORK_DIR, WORK_DIR/checkpoints or one iter_N "
            "directory"
        )
    if tag is None and (_has_shards(path) or (path / MANIFEST).is_file()):
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return _save_in(folder, tag)


def _save_in(folder: Path, tag: str | None) -> Path:
    """The save of a checkpoints folder that `tag`, or the pointer file that it means, names."""
    if tag is None or tag == "best":
        pointer = folder / (tag or "latest")
        if not pointer.is_file():
            raise CheckpointError(
                f"there is no {pointer}, so nothing says which checkpoint to take; give one iter_N "
                "directory, or --tag"
            )
        tag = named_by(pointer)
    if not (folder / tag).is_dir():
        there = ", ".join(sorted(item.name for item in folder.iterdir() if item.is_dir())) or "none"
        raise CheckpointError(f"there is no checkpoint {folder / tag}; there are: {there}")
    return folder / tag


def _has_shards(folder: Path) -> bool:
    return any(folder.glob("*_optim_states.pt"))


def _is_pointer(path: Path) -> bool:
    return path.name in ("latest", "best") and path.is_file()
