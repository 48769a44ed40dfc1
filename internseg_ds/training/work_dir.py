"""The work directory of a run: which process looks after it, where every process sees the same or each host
has its own, that no other run works in it, and that no finished one is lost."""

import fcntl
import logging
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from internseg_ds.checkpoints.saves import complete_saves, present_saves, to_disk
from internseg_ds.distributed.process_group import World, gather_from_ranks, raise_on_every_rank
from internseg_ds.errors import ConfigError, counted, shortened

log = logging.getLogger(__name__)

LOCK = ".lock"
ROOM = 2**16
"""Bytes that must be free: what a run writes at its start."""


def find_leaders(folder: Path, world: World, *, node_local: bool, ds_config: str) -> list[int]:
    """For each rank, the one that makes, renames and removes what lies in `folder` as that rank sees it: 0
    for all where the hosts share it. Collective.

    The first process of each host leaves a mark in the folder, and all look which marks they see. node_local:
    whether folders may differ; ds_config: the file that says so. Raises ConfigError, on every rank, where
    they differ and may not, or where there is no room for a mark.
    """
    mark = f".{uuid.uuid4().hex}" if world.local_rank == 0 else None
    trouble: ConfigError | None = None
    if mark is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / mark).write_bytes(bytes(ROOM))
            to_disk(folder / mark)
        except OSError as error:
            with suppress(OSError):
                (folder / mark).unlink(missing_ok=True)
            trouble = _cannot_be_written(folder, error)
    marks = gather_from_ranks(mark)
    raise_on_every_rank(trouble)
    # by name: a listing over a network can be a minute old
    seen = [rank for rank, name in enumerate(marks) if name is not None and (folder / name).exists()]
    found = gather_from_ranks((min(seen, default=None), socket.gethostname()))
    if mark is not None:
        (folder / mark).unlink()
    apart = next((host for leader, host in found if leader != 0), None)
    if apart is not None and not node_local:
        raise ConfigError(
            f"the work directory {folder} of {apart} is not the one of {found[0][1]}: every host must see "
            "the same folder; "
            'put it on a shared file system (--work-dir), or write "checkpoint": '
            f'{{"use_node_local_storage": true}} into {ds_config}, '
            "and each host keeps the files of its own processes"
        )
    return [leader for leader, _ in found]


def claim(folder: Path, world: World, leaders: Sequence[int]) -> TextIO:
    """Keeps other runs out of `folder` until the returned file is closed, or this process ends, however that
    happens. Collective.

    Raises ConfigError, on every rank, when another run has it. File systems without locks (some are mounted
    so) let everybody in. leaders: as `find_leaders` returns them.
    """
    trouble: ConfigError | None = None
    try:
        file = (folder / LOCK).open("a")
    except OSError as error:
        trouble = _cannot_be_written(folder, error)
    raise_on_every_rank(trouble)
    taken = False
    if leaders[world.rank] == world.rank:
        with suppress(OSError):
            try:
                # of the process: data workers, which may outlive it for a moment, do not hold it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                taken = True
    if any(gather_from_ranks(taken)):
        raise ConfigError(
            f"another run is at work in {folder}; wait for its end, stop it (touch {folder / 'STOP'}), or "
            "choose another --work-dir"
        )
    return file


def _cannot_be_written(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the work directory {folder} cannot be written on {socket.gethostname()}: "
        f"{error.strerror or error}; "
        "make room there, or choose another --work-dir"
    )


def check_unused(folder: Path, resume_from: Path | None, *, overwrite: bool, resumes: bool) -> None:
    """A run that starts anew would empty the records of the one that is there, and take its checkpoints for
    its own.

    resume_from: the checkpoint that the run goes on from. overwrite: whether what is there may be set aside.
    resumes: whether the run was to go on from the folder's newest checkpoint, if any. Raises ConfigError.
    """
    if overwrite and (resumes or resume_from is not None):
        raise ConfigError(
            "--overwrite starts anew and --resume goes on; keep one of them (from Python: overwrite=True, "
            "resume=...)"
        )
    here = resume_from is not None and (folder / "checkpoints").resolve() in resume_from.resolve().parents
    if not (overwrite or resumes or here) and (what := _of_a_run(folder)):
        raise ConfigError(
            f"the work directory {folder} holds a run ({what}), which would be lost; go on with it "
            "(--resume auto), choose another directory (--work-dir), or set it aside and start anew "
            '(--overwrite); from Python these are resume="auto", work_dir=... and overwrite=True'
        )


def _of_a_run(folder: Path) -> str:
    """What a run has left in a folder; "" for nothing."""
    saves = complete_saves(folder / "checkpoints")
    if saves:
        return f"{counted(len(saves), 'checkpoint')}, the newest is {saves[-1].name}"
    if present := present_saves(folder / "checkpoints"):
        return f"{shortened([path.name for path in present])} in checkpoints, without a readable note"
    records = folder / "metrics.jsonl"
    return f"records in {records.name}" if records.is_file() and records.stat().st_size else ""


def set_aside(folder: Path, leaders: Sequence[int], rank: int) -> None:
    """Moves all that lies in `folder`, which this run has claimed, into a new folder beside it. Collective.

    leaders: as `find_leaders` returns them. Raises ConfigError, on every rank, where it cannot be moved.
    """
    trouble: ConfigError | None = None
    if leaders[rank] == rank and any(item.name != LOCK for item in folder.iterdir()):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old_{number}")).exists():
            number += 1
        try:
            aside.mkdir()
            for item in folder.iterdir():
                if item.name != LOCK:
                    item.rename(aside / item.name)
            log.info("what lay in %s is now in %s (--overwrite)", folder, aside)
        except OSError as error:
            trouble = ConfigError(
                f"what lies in {folder} cannot be moved into {aside} ({error}); move it by "
                "hand, or choose another --work-dir"
            )
    raise_on_every_rank(trouble)  # and nobody goes on before
