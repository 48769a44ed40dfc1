"""Warnings of a run about its memory and disk: that it will not fit, with a fix, and what the estimate had been
when memory ran out all the same.

In: an `Estimator`, a ds_config and this process's place. Out: messages. Takes no accelerator.
"""

import logging
import shutil
from pathlib import Path
from typing import Literal

from internseg_ds.config.ds_config import DsConfig
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import ConfigError, reason_of
from internseg_ds.models.activation_checkpointing import CheckpointingPolicy, checkpointing_backbones
from internseg_ds.planning.auto_checkpointing import FASTEST_FIRST, as_it_will_train
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import HOST_PROCESS, MemoryEstimate, Platform, checkpoint_bytes
from internseg_ds.planning.tables import GIB, PHASES, free_margin
from internseg_ds.planning.zero_settings import ZeroSettings

log = logging.getLogger(__name__)


def shortfall(estimator: Estimator, ds: DsConfig, world: World) -> str | None:
    """The warning that a run will not fit into its device's memory, with the fix; None when it fits. Never
    raises.

    A model that is small beside the memory is not looked at closely, and evaluations, which take fewer
    windows where there is less room, are not looked at: the start of a run is not to wait.
    """
    try:
        platform = Platform.of_this_process(estimator.experiment, ds, world)
        if estimator.fits_for_sure(ds, platform.device_bytes):
            return None
        memory = as_it_will_train(estimator, ds, platform).training_memory(ds, platform)
        if memory.fits_device:
            return None
        return f"{_does_not_fit(memory)}; {_fix(estimator, ds, world, platform)}"
    except Exception as error:  # an odd model is no reason not to train it
        log.info("whether this run fits into memory could not be estimated: %s", reason_of(error))
        return None


def _does_not_fit(memory: MemoryEstimate) -> str:
    platform = memory.platform
    largest = max(
        (part for part in memory.parts if memory.fullest in part.phases), key=lambda part: part.device
    )
    return (
        f"this run will not fit by the estimate: it needs {memory.peak / GIB:.1f} GiB per {platform.unit} "
        f"({PHASES[memory.fullest]}) and there are {platform.device_bytes / GIB:.1f}{free_margin(platform)}; "
        f"the largest part is {largest.name}, {largest.device / GIB:.1f} GiB"
    )


def _fix(estimator: Estimator, ds: DsConfig, world: World, platform: Platform) -> str:
    """What to do: the ds_config beside this one that fits with the least on the host, else what else makes a
    run smaller."""
    beside = sorted(Path(ds.source).parent.glob("*.json")) if Path(ds.source).is_file() else []
    fitting: list[tuple[int, int, Path]] = []
    for path in beside:
        try:
            other, _ = estimator.resolve(path, world.size)
            memory = as_it_will_train(estimator, other, platform).training_memory(other, platform)
        except ConfigError:
            continue
        same = (other.precision, other.bf16_master) == (ds.precision, ds.bf16_master)
        if same and memory.fits_device:
            fitting.append((memory.host, memory.peak, path))
    if fitting:
        host, peak, path = min(fitting)
        on_host = f" and {host / GIB:.0f} GiB of the host's memory per process"
        # 1 GiB more than every process takes: state is offloaded
        return f"{path} would need {peak / GIB:.1f} GiB{on_host if host > HOST_PROCESS + GIB else ''}"
    return (
        f"{'none of the ds_configs beside it would fit: ' if beside else ''}"
        'use more GPUs, offload, hold moments in fewer bytes (engine.optimizer_states="8bit"), or take '
        "fewer images per GPU (data.samples_per_gpu), smaller crops, "
        'or activation checkpointing (engine.recomputation="blocks") if it is off'
    )


def no_room_to_save(estimator: Estimator, ds: DsConfig, work_dir: Path) -> str | None:
    """The warning that the disk has no room for a checkpoint; None where it has, or cannot be asked, or holds
    a part only (node-local storage). A warning only: what is free may change."""
    if (ds.raw.get("checkpoint") or {}).get("use_node_local_storage"):
        return None
    ema = estimator.experiment.engine.ema is not None
    needed = checkpoint_bytes(estimator.model, ZeroSettings.of(ds), ema=ema, matrices=estimator.matrices)
    try:
        free = shutil.disk_usage(
            next(folder for folder in (work_dir, *work_dir.absolute().parents) if folder.is_dir())
        ).free
    except OSError:
        return None
    if needed <= free:
        return None
    return (
        f"there is no room for a checkpoint: each takes {needed / GIB:.1f} GiB and {free / GIB:.1f} are "
        f"free in {work_dir}; make room, choose another --work-dir, or train with --no-save to measure only"
    )


def after_out_of_memory(
    estimator: Estimator,
    ds: DsConfig,
    world: World,
    checkpointing: CheckpointingPolicy | Literal["config"],
) -> str:
    """The estimate of a run that has run out of memory, and what would take less. checkpointing: what it
    trains with. Never raises."""
    try:
        platform = Platform.of_this_process(estimator.experiment, ds, world)
        trained = estimator if checkpointing == "config" else estimator.under(checkpointing)
        memory = trained.training_memory(ds, platform)
        fixes = _cheaper_checkpointing(estimator, ds, memory)
        if estimator.experiment.micro_batch > 1:
            fixes.append(
                "a smaller data.samples_per_gpu, with engine.global_batch to keep the recipe's batch"
            )
        fixes.append("a ds_config that keeps less on the device (launch/plan.py compares them)")
        return (
            f"Out of memory. The estimate had been {memory.peak / GIB:.1f} GiB of "
            f"{platform.device_bytes / GIB:.1f} per {platform.unit} ({PHASES[memory.fullest]}), with "
            f"{trained.checkpointing!r} recomputed. To need less: {'; '.join(fixes)}."
        )
    except Exception as error:  # the error that ends the run is another one
        return f"Out of memory. There is no estimate of what it needs: {reason_of(error)}"


def _cheaper_checkpointing(estimator: Estimator, ds: DsConfig, memory: MemoryEstimate) -> list[str]:
    """The setting of the first policy that needs less than `memory` and fits, or of the one that comes
    closest; empty where none needs less."""
    if not checkpointing_backbones(estimator.model):
        return []
    device_bytes = memory.platform.device_bytes
    found = {policy: estimator.under(policy).training_memory(ds, memory.platform) for policy in FASTEST_FIRST}
    less = [policy for policy in FASTEST_FIRST if found[policy].peak < memory.peak]
    if not less:
        return []
    best = min(less, key=lambda policy: max(0, found[policy].needed - device_bytes))
    return [f"engine.recomputation={best!r} ({found[best].peak / GIB:.1f} GiB by the estimate)"]
