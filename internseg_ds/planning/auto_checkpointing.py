"""`engine.recomputation="auto"`: the activation checkpointing that recomputes least and still fits, by the
estimate of the run's memory.

In: an `Estimator`, a ds_config, and what a process runs on. Out: a policy of `models.activation_checkpointing`.
"""

import logging
from pathlib import Path
from typing import Literal

import torch

from internseg_ds.config.ds_config import DsConfig
from internseg_ds.distributed.device_memory import free_memory, processes_here
from internseg_ds.distributed.process_group import World, gather_from_ranks
from internseg_ds.errors import reason_of
from internseg_ds.models.activation_checkpointing import (
    CheckpointingPolicy,
    PolicyNotPossible,
    checkpointing_backbones,
)
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import Platform

log = logging.getLogger(__name__)

FASTEST_FIRST: tuple[CheckpointingPolicy, ...] = ("none", "all_but_matmuls", 2, "blocks")


def least_checkpointing(estimator: Estimator, ds: DsConfig, platform: Platform) -> CheckpointingPolicy:
    """The first policy of `FASTEST_FIRST` under which forward, backward and update fit into the device; the
    last one where none does. Policies that the backbone cannot have are passed over.

    An evaluation is no reason to recompute: it takes what room there is. Raises ConfigError for a backbone
    without activation checkpointing.
    """
    if estimator.fits_for_sure(ds, platform.device_bytes):
        return "none"
    needs: list[str] = []
    for policy in FASTEST_FIRST:
        try:
            memory = estimator.under(policy).training_memory(ds, platform)
        except PolicyNotPossible:
            needs.append(f"{policy!r} is not for this backbone")
            continue
        needs.append(f"{policy!r} needs {memory.needed / 2**30:.2f}")
        if memory.fits_device:
            break
    log.info(
        '%s: engine.recomputation="auto" becomes %r: of %.2f GiB, %s by the estimate',
        Path(ds.source).name,
        policy,
        platform.device_bytes / 2**30,
        ", ".join(needs),
    )
    return policy


def as_it_will_train(estimator: Estimator, ds: DsConfig, platform: Platform) -> Estimator:
    """The estimator of the activation checkpointing that `engine.recomputation="auto"` will choose; the same
    one where it is chosen already."""
    if estimator.experiment.engine.recomputation != "auto" or not checkpointing_backbones(estimator.model):
        return estimator
    return estimator.under(least_checkpointing(estimator, ds, platform))


def agreed_checkpointing(
    estimator: Estimator, ds: DsConfig, world: World, compute: torch.dtype
) -> CheckpointingPolicy | Literal["config"]:
    """What `engine.recomputation` comes to: "auto" by the rank with the least free memory. Collective where
    it is "auto"; all ranks get the same. compute: the dtype that the backbone computes in.

    A backbone that cannot recompute by our policies (those of mmseg) is left to its config's `with_cp`, and
    so is a model whose memory cannot be estimated, with a line in the log.
    """
    if (asked := estimator.experiment.engine.recomputation) != "auto":
        return asked
    if not checkpointing_backbones(estimator.model):
        return "config"
    least = min(gather_from_ranks(free_memory(world.device, processes_here(world))))
    chosen: CheckpointingPolicy | Literal["config"] = "config"
    if world.is_main:
        platform = Platform(least, on_gpu=world.device.type == "cuda", compute=compute)
        try:
            chosen = least_checkpointing(estimator, ds, platform)
        except Exception as error:  # whatever a part of somebody's model refuses with: no reason not to train
            log.info(
                'engine.recomputation="auto" has no estimate to choose by, so the backbone\'s with_cp '
                "decides: %s",
                reason_of(error),
            )
    return gather_from_ranks(chosen)[0]
