"""The work directory of a run: which process looks after it, where every process sees the same or each host has its own, and that no other run works in it."""

import fcntl
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from internseg_ds.distributed.process_group import World, of_all_ranks
from internseg_ds.engine.outputs import make_folder
from internseg_ds.errors import ConfigError


def leaders(folder: Path, world: World, *, node_local: bool, ds_config: str) -> list[int]:
    """For each rank, the one that makes, renames and removes what lies in `folder` as that rank sees it: 0 for all where the hosts share it. Collective.

    The first process of each host leaves a mark in the folder, and all look which marks they see. node_local: whether folders may differ; ds_config: the file
    that says so. Raises ConfigError, on every rank, where they differ and may not.
    """
    mark = f".{uuid.uuid4().hex}" if world.local_rank == 0 else None
    if mark is not None:
        make_folder(folder)
        (folder / mark).touch()
    marks = of_all_ranks(mark)
    seen = [rank for rank, name in enumerate(marks) if name is not None and (folder / name).exists()]  # by name: a listing over a network can be a minute old
    found = of_all_ranks((min(seen, default=None), socket.gethostname()))
    if mark is not None:
        (folder / mark).unlink()
    apart = next((host for leader, host in found if leader != 0), None)
    if apart is not None and not node_local:
        raise ConfigError(f"the work directory {folder} of {apart} is not the one of {found[0][1]}: every host must see the same folder; "
                          f'put it on a shared file system (--work-dir), or write "checkpoint": {{"use_node_local_storage": true}} into {ds_config}, '
                          "and each host keeps the files of its own processes")
    return [leader for leader, _ in found]


def claim(folder: Path, world: World, leaders: Sequence[int]) -> TextIO:
    """Keeps other runs out of `folder` until the returned file is closed, or this process ends, however that happens. Collective.

    Raises ConfigError, on every rank, when another run has it. File systems without locks (some are mounted so) let everybody in.
    """
    file, taken = (folder / ".lock").open("a"), False
    if leaders[world.rank] == world.rank:
        with suppress(OSError):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: data workers, which may outlive it for a moment, do not hold it
            except (BlockingIOError, PermissionError):
                taken = True
    if any(of_all_ranks(taken)):
        raise ConfigError(f"another run is at work in {folder}; wait for its end, stop it (touch {folder / 'STOP'}), or choose another --work-dir")
    return file
