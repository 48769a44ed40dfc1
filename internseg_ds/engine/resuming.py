"""The checkpoint that a run goes on from: found, agreed on by all hosts, and held against the run's model and parameter groups."""

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from internseg_ds.checkpoints.manifest import read_manifest, verify_manifest
from internseg_ds.checkpoints.saves import complete_saves, noted_saves, place_of, pointed_to
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


def checkpoint_to_resume(
    resume: str | os.PathLike | None, work_dir: Path, *, check: bool = True
) -> Path | None:
    """The checkpoint directory that --resume means: None, "auto" (the newest of `work_dir` that is whole as far as it is read
    here, if there is any), or a path. check: what is read of it is held against its checksums.

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


def agree_to_resume(found: Path | None, stage: int, *, check: bool = True) -> ZeroCheckpoint | None:
    """The checkpoint that all hosts go on from, given what each has found (`checkpoint_to_resume`): the same, or else the newest that all have. Collective.

    stage: of ZeRO, of this run. check: what is read of it, now and later, is held against its checksums. Raises CheckpointError,
    on every rank, when hosts have none in common, or when one lacks what its processes need of it.
    """

    def identity(path: Path) -> tuple[str, tuple[int, float]]:  # a step may have been saved twice
        return path.name, place_of(read_manifest(path) or {})

    here = {}
    if found is not None:
        newest = (
            identity(found)[1] if read_manifest(found) is not None else None
        )  # what is newer was found damaged here
        here = {
            identity(path): path
            for path in complete_saves(found.parent)
            if newest is None or identity(path)[1] <= newest
        }
        here[identity(found)] = found
    hosts = of_all_ranks((socket.gethostname(), identity(found) if found is not None else None, list(here)))
    if len({chosen for _, chosen, _ in hosts}) > 1:
        common = set(here).intersection(*(saves for _, _, saves in hosts))
        they = ", ".join(
            dict.fromkeys(f"{host} {chosen[0] if chosen else 'none'}" for host, chosen, _ in hosts)
        )
        if not common:
            raise CheckpointError(
                f"hosts have different checkpoints to go on from ({they}) and none that all have; "
                "give the missing folders back to their hosts, or start anew in another work directory"
            )
        found = here[max(common, key=lambda save: save[1])]
        log.warning(
            "the newest checkpoints of the hosts differ (%s); going on from %s, the newest that all have",
            they,
            found.name,
        )
    if found is None:
        return None
    return _opened_by_all(found, stage, check)


def one_before(checkpoint: ZeroCheckpoint, stage: int, *, check: bool = True) -> ZeroCheckpoint | None:
    """The newest save before `checkpoint` that all hosts have and that is whole, as far as opening it tells; None where there is
    none. stage, check: as for `agree_to_resume`. Collective."""
    here = {
        (path.name, place_of(note)): path
        for path, note in noted_saves(checkpoint.path.parent)
        if path != checkpoint.path
        and (not checkpoint.manifest or place_of(note) < place_of(checkpoint.manifest))
    }
    for save in sorted(
        set(here).intersection(*of_all_ranks(list(here))), key=lambda save: save[1], reverse=True
    ):
        try:
            return _opened_by_all(here[save], stage, check)
        except CheckpointError as error:
            log.warning("%s", error)
    return None


def _opened_by_all(path: Path, stage: int, check: bool) -> ZeroCheckpoint:
    """Opens a save. Collective; raises CheckpointError, on every rank, where it is damaged or lacks what a host needs of it."""
    size, trouble, checkpoint = dist.get_world_size(), None, None
    try:
        checkpoint = ZeroCheckpoint(path, partial=True, check=check)
        if len(checkpoint.ranks) < checkpoint.world_size and (
            (size, stage) != (checkpoint.world_size, checkpoint.stage)
            or dist.get_rank() not in checkpoint.ranks
        ):
            trouble = (
                f"{path} of {socket.gethostname()} lacks files that {size} processes under ZeRO-{stage} need, {checkpoint.world_size} saved it under "
                f"ZeRO-{checkpoint.stage}; {advice(checkpoint.manifest)}"
            )
    except CheckpointError as error:
        trouble = f"on {socket.gethostname()}: {error}"
    if troubles := [each for each in of_all_ranks(trouble) if each is not None]:
        raise CheckpointError(troubles[0])
    return checkpoint


def check_resumable(
    path: Path, model: nn.Module, groups: Sequence[Mapping[str, Any]], *, check: bool = True
) -> Mapping[str, Any]:
    """What the checkpoint's note says of its run (CLASSES, config text). Raises CheckpointError when it is of another model than `model`, or trained other
    parameters, or in other groups.

    groups: those of the run that is to go on, as `named_groups` gives them. Stage and number of processes may differ.
    check: as for `checkpoint_to_resume`.
    """
    checkpoint = ZeroCheckpoint(path, partial=True, check=check)
    fit_segmentor(model, weights_of(checkpoint))
    trains = {name for name, param in model.named_parameters() if param.requires_grad}
    if differ := sorted(trains ^ checkpoint.trained):
        name = differ[0]
        raise CheckpointError(
            f"{path} {'froze' if name in trains else 'trained'} {name} and this run {'trains' if name in trains else 'freezes'} it "
            f"({len(differ)} parameters differ); resume with the config that it was saved with, "
            f"or start anew from its weights with --load-from"
        )
    then, now = (
        {name: (group["lr"], group["weight_decay"]) for group in them for name in group["names"]}
        for them in (checkpoint.manifest.get("groups") or groups, groups)
    )
    if differ := [name for name in now if then.get(name) != now[name]]:
        name = differ[0]
        raise CheckpointError(
            f"{path} trained {name} with lr and weight decay {then.get(name)}, this run's config says {now[name]} "
            f"({len(differ)} parameters differ); resume with the optimizer section that it was saved with, "
            f"or start anew from its weights with --load-from"
        )
    return checkpoint.manifest.get("meta") or {}


def state_of(checkpoint: ZeroCheckpoint, seed: int) -> TrainState:
    """The state that travels with a checkpoint; of one that plain DeepSpeed wrote, what its counters say."""
    state = TrainState(step=checkpoint.steps, images=checkpoint.samples, seed=seed)
    state.load_state_dict(checkpoint.client_state.get("internseg_ds", {}))
    return state
