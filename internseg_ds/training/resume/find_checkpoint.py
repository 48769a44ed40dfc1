"""The checkpoint that a run goes on from: found, agreed on by all hosts, and held against the run's model and
parameter groups."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from internseg_ds.checkpoints.manifest import MANIFEST, read_manifest, verify_manifest
from internseg_ds.checkpoints.saves import complete_saves, noted_saves, place_of, pointed_to, present_saves
from internseg_ds.checkpoints.weights import weights_of
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.checkpoints.zero_files import find_save, missing_file_advice
from internseg_ds.config.tuning_options import described
from internseg_ds.distributed.process_group import gather_from_ranks, raise_on_every_rank
from internseg_ds.distributed.weight_loading import match_saved
from internseg_ds.errors import CheckpointError, counted, shortened
from internseg_ds.optimization.optimizers import kept_state
from internseg_ds.optimization.parameter_groups import named_groups, parameter_groups
from internseg_ds.preflight.preflight import Plan
from internseg_ds.training.resume.changed_settings import changed_classes, changed_groups, changed_settings
from internseg_ds.training.train_state import TrainState

log = logging.getLogger(__name__)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint directory that `path` means: one itself, or a folder (WORK_DIR, WORK_DIR/checkpoints)
    whose `latest` names it.

    Raises CheckpointError when there is none, or when it was not finished.
    """
    path = find_save(Path(path))
    verify_manifest(path)  # where there is one: plain DeepSpeed writes none
    return path


def checkpoint_to_resume(
    resume: str | os.PathLike | None, work_dir: Path, *, check: bool = True
) -> Path | None:
    """The checkpoint directory that --resume means: None, "auto" (the newest of `work_dir` that is whole as
    far as it is read here, if there is any), or a path. check: what is read of it is held against its
    checksums.

    Raises CheckpointError when the path names none, or when all saves of `work_dir` are damaged: starting
    anew would lose them.
    """
    if resume is None:
        return None
    if resume != "auto":
        return find_checkpoint(resume)
    folder, trouble = work_dir / "checkpoints", None
    saves = complete_saves(folder)
    latest = folder / (pointed_to(folder, "latest") or "")  # plain DeepSpeed's have no note, but a pointer
    if latest != folder and latest.is_dir() and latest not in saves:
        saves = [*saves, latest]
    for path in reversed(saves):
        try:
            return ZeroCheckpoint(find_checkpoint(path), partial=True, check=check).path
        except CheckpointError as error:
            trouble = trouble or error
            log.warning("%s; going on from the one before it", error)
    if trouble is not None:
        raise CheckpointError(
            f"{trouble}; none of the {counted(len(saves), 'checkpoint')} in {folder} is whole"
        )
    if present := present_saves(folder):
        raise CheckpointError(
            f"--resume auto: none of the checkpoints in {folder} ({shortened([path.name for path in present])}) "
            f"has a note ({MANIFEST}) that can be read, and `latest` names none; name one to go on from "
            "(--resume PATH), or set them aside and start anew (--overwrite)"
        )
    return None


def agree_to_resume(found: Path | None, stage: int, *, check: bool = True) -> ZeroCheckpoint | None:
    """The checkpoint that all hosts go on from, given what each has found (`checkpoint_to_resume`): the same,
    or else the newest that all have. Collective.

    stage: of ZeRO, of this run. check: what is read of it, now and later, is held against its checksums.
    Raises CheckpointError, on every rank, when hosts have none in common, or when one lacks what its
    processes need of it.
    """

    def identity(path: Path) -> tuple[str, tuple[int, float]]:  # a step may have been saved twice
        return path.name, place_of(read_manifest(path) or {})

    here = {}
    if found is not None:
        # what is newer was found damaged here
        newest = identity(found)[1] if read_manifest(found) is not None else None
        here = {
            identity(path): path
            for path in complete_saves(found.parent)
            if newest is None or identity(path)[1] <= newest
        }
        here[identity(found)] = found
    hosts = gather_from_ranks(
        (socket.gethostname(), identity(found) if found is not None else None, list(here))
    )
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
    """The newest save before `checkpoint` that all hosts have and that is whole, as far as opening it tells;
    None where there is none. stage, check: as for `agree_to_resume`. Collective."""
    here = {
        (path.name, place_of(note)): path
        for path, note in noted_saves(checkpoint.path.parent)
        if path != checkpoint.path
        and (not checkpoint.manifest or place_of(note) < place_of(checkpoint.manifest))
    }
    for save in sorted(
        set(here).intersection(*gather_from_ranks(list(here))), key=lambda save: save[1], reverse=True
    ):
        try:
            return _opened_by_all(here[save], stage, check)
        except CheckpointError as error:
            log.warning("%s", error)
    return None


def _opened_by_all(path: Path, stage: int, check: bool) -> ZeroCheckpoint:
    """Opens a save. Collective; raises CheckpointError, on every rank, where it is damaged or lacks what a
    host needs of it."""
    trouble: CheckpointError | None = None
    try:
        checkpoint = _opened_here(path, stage, check)
    except CheckpointError as error:
        trouble = error
    raise_on_every_rank(trouble)
    return checkpoint


def _opened_here(path: Path, stage: int, check: bool) -> ZeroCheckpoint:
    """Opens a save, as far as this host has it. Raises CheckpointError where it is damaged here, or lacks files
    that this rank needs."""
    host, size = socket.gethostname(), dist.get_world_size()
    try:
        checkpoint = ZeroCheckpoint(path, partial=True, check=check)
    except CheckpointError as error:
        raise CheckpointError(f"on {host}: {error}") from error
    if len(checkpoint.ranks) < checkpoint.world_size and (
        (size, stage) != (checkpoint.world_size, checkpoint.stage) or dist.get_rank() not in checkpoint.ranks
    ):
        raise CheckpointError(
            f"{path} of {host} lacks files that {counted(size, 'process')} under ZeRO-{stage} need, "
            f"{checkpoint.world_size} saved it under ZeRO-{checkpoint.stage}; "
            f"{missing_file_advice(checkpoint.manifest)}"
        )
    return checkpoint


def check_resumable(
    path: Path, model: nn.Module, optimizer: Mapping[str, Any], *, check: bool = True
) -> Mapping[str, Any]:
    """The manifest of the checkpoint, which says what its run was (`meta`: CLASSES, config text; `groups`).
    Raises CheckpointError when it is of another model than `model`, trained other parameters, or has the state
    of another optimizer.

    Stage, number of processes and parameter groups may differ. optimizer: the config's section. check: as for
    `checkpoint_to_resume`.
    """
    checkpoint = ZeroCheckpoint(path, partial=True, check=check)
    match_saved(model, weights_of(checkpoint))
    trains = {name for name, param in model.named_parameters() if param.requires_grad}
    if differ := sorted(trains ^ checkpoint.trained):
        name = differ[0]
        raise CheckpointError(
            f"{path} {'froze' if name in trains else 'trained'} {name} and this run "
            f"{'trains' if name in trains else 'freezes'} it "
            f"({counted(len(differ), 'parameter')} differ); resume with the config that it was saved with, "
            f"or start anew from its weights with --load-from"
        )
    _check_optimizer_state(checkpoint, optimizer)
    return checkpoint.manifest


def _check_optimizer_state(checkpoint: ZeroCheckpoint, optimizer: Mapping[str, Any]) -> None:
    """Raises CheckpointError when the checkpoint holds other moments than this run's optimizer has: they would
    silently begin at zero. So would those of parameters of which it holds none."""
    if checkpoint.moments and (
        lacking := [each for each in checkpoint.trained if not checkpoint.moments_of(each)]
    ):
        raise CheckpointError(
            f"{checkpoint.path} holds no state of the optimizer of {shortened(sorted(lacking))}; take another "
            "checkpoint"
        )
    state = kept_state(optimizer)
    kept, held = [*state.moments, *state.counts], [*checkpoint.moments, *checkpoint.counts]
    if checkpoint.scheduled and set(held) != set(kept):
        kind = optimizer.get("type", "AdamW")
        raise CheckpointError(
            f"{checkpoint.path} holds {', '.join(held) or 'no state'} of its optimizer, and "
            f"optimizer.type={kind!r} of this run keeps {', '.join(kept) or 'nothing'}; resume with the "
            "optimizer that it was saved with, or start anew from its weights with --load-from"
        )


def _check_same_epochs(path: Path, saved: int | None, now: int | None) -> None:
    """Raises CheckpointError where the steps of a run that counts epochs would be another number of epochs.

    saved, now: steps of an epoch; None where steps are counted, or the save does not say.
    """
    if saved is not None and now is not None and saved != now:
        raise CheckpointError(
            f"an epoch of the run of {path} has {saved} steps, one of this run {now}, so it would not train its "
            "epochs; keep batch and data, or count steps from now on: runner=dict(type='IterBasedRunner', "
            "max_iters=...), and by_epoch=False in lr_config"
        )


def compare_with_checkpoint(plan: Plan) -> Plan:
    """The plan of a run that goes on from `plan.resume_from`, with a note for each setting that differs from
    that checkpoint's run; of one that starts anew, the plan itself.

    Raises CheckpointError where the checkpoint does not fit the run: another model, other trained parameters,
    other classes.
    """
    if plan.resume_from is None:
        return plan
    return replace(plan, notes=(*changes_since(plan.resume_from, plan), *plan.notes))


def changes_since(path: Path, plan: Plan) -> list[str]:
    """A line for each setting of the run that differs from those of the checkpoint's run. Raises
    CheckpointError where the checkpoint does not fit."""
    experiment = plan.experiment
    _check_same_tuning(path, described(experiment.engine.tune))
    check = experiment.engine.checksums
    manifest = check_resumable(path, plan.meta_model, experiment.optimizer, check=check)
    saved = manifest.get("meta") or {}
    _check_same_epochs(path, saved.get("steps_per_epoch"), experiment.schedule.steps_per_epoch)
    groups = named_groups(plan.meta_model, parameter_groups(plan.meta_model, experiment.optimizer))
    return [
        *changed_settings(saved.get("config"), plan.config_text),
        *changed_groups(manifest.get("groups"), groups),
        *changed_classes(path, saved.get("CLASSES"), plan.train_set.CLASSES),
    ]


def _check_same_tuning(path: Path, now: Any) -> None:
    """now: `engine.tune` of this run, as `described`. Raises CheckpointError where the checkpoint's run says
    that it had another: its parameters are others, or mean something else. Notes of saves before that setting
    say nothing."""
    then = ((read_manifest(path) or {}).get("meta") or {}).get("tune", now)
    if _meaning_of(then) != _meaning_of(now):
        raise CheckpointError(
            f"{path} was saved with engine.tune={then!r} and this run has engine.tune={now!r}, which trains other "
            "parameters; resume with that of the checkpoint, or start anew from its weights with --load-from"
        )


def _meaning_of(tune: Any) -> Any:
    """`engine.tune` but for what changes no parameter's meaning: the layers that LoRA adapts show in the names of
    parameters, however they were chosen, and its dropout is a setting like others."""
    lora = tune.get("lora") if isinstance(tune, dict) else None
    if not isinstance(lora, dict):
        return tune
    return {"lora": {name: value for name, value in lora.items() if name not in ("targets", "dropout")}}


def state_of(checkpoint: ZeroCheckpoint, seed: int) -> TrainState:
    """The state that travels with a checkpoint; of one that plain DeepSpeed wrote, what its counters say."""
    state = TrainState(step=checkpoint.steps, images=checkpoint.samples, seed=seed)
    state.load_state_dict(checkpoint.client_state.get("internseg_ds", {}))
    return state
