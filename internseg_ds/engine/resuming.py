"""The checkpoint that a run goes on from: found, agreed on by all hosts, and held against the run's model and parameter groups."""

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from internseg_ds.checkpoints.checksums import check_part
from internseg_ds.checkpoints.manifest import MANIFEST, checked_files, read_manifest, verify_manifest
from internseg_ds.checkpoints.saves import complete_saves, place_of, pointed_to
from internseg_ds.checkpoints.weights import weights_of
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint, advice, find_save
from internseg_ds.distributed.loading import fit_segmentor
from internseg_ds.distributed.process_group import of_all_ranks
from internseg_ds.engine.state import TrainState
from internseg_ds.errors import CheckpointError

log = logging.getLogger(__name__)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint directory that `path` means: one itself, or a folder (WORK_DIR, WORK_DIR/checkpoints) whose `latest` names it.

    Raises CheckpointError when there is none, or when it was not finished.
    """
    path = find_save(Path(path))
    verify_manifest(path)  # where there is one: plain DeepSpeed writes none
    return path


def checkpoint_to_resume(resume: str | os.PathLike | None, work_dir: Path, *, check: bool = True) -> Path | None:
    """The checkpoint directory that --resume means: None, "auto" (the newest of `work_dir` that is whole as far as it is read
    here, if there is any), or a path. check: what is read of it is held against its checksums; the rest is, later, by all ranks
    together (`agree_to_resume`).

    Raises CheckpointError when the path names none, or when all saves of `work_dir` are damaged: starting anew would lose them.
    """
    if resume is None:
        return None
    if resume != "auto":
        return find_checkpoint(resume)
    folder, trouble = work_dir / "checkpoints", None
    saves = complete_saves(folder)
    latest = folder / (pointed_to(folder, "latest") or "")  # plain DeepSpeed's have no note, but a pointer
    if latest != folder and latest.is_dir() and latest not in saves[-1:]:
        saves = [*(path for path in saves if path != latest), latest]
    for path in reversed(saves):
        try:
            return ZeroCheckpoint(find_checkpoint(path), partial=True, check=check).path
        except CheckpointError as error:
            trouble = trouble or error
            log.warning("%s; going on from the one before it", error)
    if trouble is not None:
        raise CheckpointError(f"{trouble}; none of the {len(saves)} checkpoints in {folder} is whole")
    return None


def agree_to_resume(found: Path | None, stage: int, *, auto: bool = False, check: bool = True) -> ZeroCheckpoint | None:
    """The checkpoint that all hosts go on from, given what each has found (`checkpoint_to_resume`): the same, or else the newest that all have. Collective.

    stage: of ZeRO, of this run. check: its files are held against their checksums, by all ranks together. auto: where it is
    damaged, the one before it is taken. Raises CheckpointError, on every rank, when hosts have none in common, when it is
    damaged (and so are all before it), or when one host lacks what its processes need of it.
    """
    def identity(path: Path) -> tuple[str, tuple[int, float]]:  # a step may have been saved twice
        return path.name, place_of(read_manifest(path) or {})

    here = {identity(path): path for path in [*complete_saves(found.parent), found]} if found is not None else {}
    hosts = of_all_ranks((socket.gethostname(), identity(found) if found is not None else None, list(here)))
    common = set(here).intersection(*(saves for _, _, saves in hosts))
    if len({chosen for _, chosen, _ in hosts}) > 1:
        they = ", ".join(dict.fromkeys(f"{host} {chosen[0] if chosen else 'none'}" for host, chosen, _ in hosts))
        if not common:
            raise CheckpointError(f"hosts have different checkpoints to go on from ({they}) and none that all have; "
                                  "give the missing folders back to their hosts, or start anew in another work directory")
        found = here[max(common, key=lambda save: save[1])]
        log.warning("the newest checkpoints of the hosts differ (%s); going on from %s, the newest that all have", they, found.name)
    if found is None:
        return None
    chosen, first = identity(found), None
    unnoted = read_manifest(found) is None  # of plain DeepSpeed, which tells no order
    older = sorted((save for save in common if save != chosen and (unnoted or save[1] < chosen[1])), key=lambda save: save[1])
    while (damage := _damage(found, check)) is not None:
        first = first or damage
        if not auto or not older:
            raise CheckpointError(first + (f"; none of the checkpoints in {found.parent} is whole" if auto else ""))
        if dist.get_rank() == 0:
            log.warning("%s; going on from the one before it", damage)
        found = here[older.pop()]
    size, trouble, checkpoint = dist.get_world_size(), None, None
    try:
        checkpoint = ZeroCheckpoint(found, partial=True, check=False)  # it was looked at
        if len(checkpoint.ranks) < checkpoint.world_size and ((size, stage) != (checkpoint.world_size, checkpoint.stage)
                                                              or dist.get_rank() not in checkpoint.ranks):
            trouble = (f"{found} of {socket.gethostname()} lacks files that {size} processes under ZeRO-{stage} need, {checkpoint.world_size} saved it under "
                       f"ZeRO-{checkpoint.stage}; {advice(checkpoint.manifest)}")
    except CheckpointError as error:
        trouble = f"on {socket.gethostname()}: {error}"
    if troubles := [each for each in of_all_ranks(trouble) if each is not None]:
        raise CheckpointError(troubles[0])
    return checkpoint


def _damage(path: Path, check: bool) -> str | None:
    """What is wrong with the files of a save on some host; None where nothing is. Ranks that see the same folder share the reading. Collective."""
    rank, trouble, began = dist.get_rank(), None, time.monotonic()
    places = of_all_ranks(_identity_on_disk(path))
    sharing = [other for other, place in enumerate(places) if place == places[rank]]
    try:
        verify_manifest(path)
        if check:
            files = list(checked_files(path, read_manifest(path) or {}).values())
            check_part(files, sharing.index(rank), len(sharing))
            log.info("%s: %.2f GiB held against their checksums in %.1f s", path,
                     sum(file.nbytes for file in files) / 2**30, time.monotonic() - began)
    except CheckpointError as error:
        trouble = f"{error} (on host {socket.gethostname()})"
    return next((each for each in of_all_ranks(trouble) if each is not None), None)


def _identity_on_disk(path: Path) -> tuple[int, int] | None:
    """The same for all that see one folder, another for a copy of it."""
    try:
        seen = (path / MANIFEST if (path / MANIFEST).is_file() else path).stat()
    except OSError:
        return None
    return seen.st_ino, seen.st_ctime_ns


def check_resumable(path: Path, model: nn.Module, groups: Sequence[Mapping[str, Any]], *, check: bool = True) -> None:
    """Raises CheckpointError when the checkpoint is of another model than `model`, or trained other parameters, or in other groups.

    groups: those of the run that is to go on, as `named_groups` gives them. Stage and number of processes may differ.
    check: as for `checkpoint_to_resume`.
    """
    checkpoint = ZeroCheckpoint(path, partial=True, check=check)
    fit_segmentor(model, weights_of(checkpoint))
    trains = {name for name, param in model.named_parameters() if param.requires_grad}
    if differ := sorted(trains ^ checkpoint.trained):
        name = differ[0]
        raise CheckpointError(f"{path} {'froze' if name in trains else 'trained'} {name} and this run {'trains' if name in trains else 'freezes'} it "
                              f"({len(differ)} parameters differ); resume with the config that it was saved with, "
                              f"or start anew from its weights with --load-from")
    then, now = ({name: (group["lr"], group["weight_decay"]) for group in them for name in group["names"]}
                 for them in (checkpoint.manifest.get("groups") or groups, groups))
    if differ := [name for name in now if then.get(name) != now[name]]:
        name = differ[0]
        raise CheckpointError(f"{path} trained {name} with lr and weight decay {then.get(name)}, this run's config says {now[name]} "
                              f"({len(differ)} parameters differ); resume with the optimizer section that it was saved with, "
                              f"or start anew from its weights with --load-from")


def state_of(checkpoint: ZeroCheckpoint, seed: int) -> TrainState:
    """The state that travels with a checkpoint; of one that plain DeepSpeed wrote, what its counters say."""
    state = TrainState(step=checkpoint.steps, images=checkpoint.samples, seed=seed)
    state.load_state_dict(checkpoint.client_state.get("internseg_ds", {}))
    return state
