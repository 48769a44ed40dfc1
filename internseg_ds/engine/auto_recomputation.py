"""`engine.recomputation="auto"`: the activation checkpointing that recomputes least and still fits, by the plan of the run's memory.

In: a `Planner`, a ds_config, and the bytes of a device. Out: a policy of `models.recomputation`.
"""

import logging
from typing import Literal

import torch

from internseg_ds.distributed.device_memory import free_memory, processes_here
from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.distributed.process_group import World, of_all_ranks
from internseg_ds.engine.planner import Planner
from internseg_ds.errors import reason_of
from internseg_ds.models.recomputation import Recomputation, recomputing_backbones

log = logging.getLogger(__name__)

FASTEST_FIRST: tuple[Recomputation, ...] = ("none", "all_but_matmuls", 2, "blocks")


def least_recomputation(
    planner: Planner,
    ds: DsConfig,
    device_bytes: float,
    *,
    compute: torch.dtype | None = None,
    on_gpu: bool = True,
) -> Recomputation:
    """The first policy of `FASTEST_FIRST` under which forward, backward and update fit into a device of so many bytes; the last one where none does.

    compute: the dtype that the backbone computes in, None for that of GPUs. on_gpu: whether some of the memory should stay free (`Footprint.margin`). An
    evaluation is no reason to recompute: it takes what room there is. Raises ConfigError for a backbone without activation checkpointing.
    """
    if planner.is_small_beside(ds, device_bytes):
        return "none"
    needs: list[str] = []
    for policy in FASTEST_FIRST:
        footprint = planner.under(policy).footprint(
            ds, device_bytes, compute=compute, validate=False, exact=False, on_gpu=on_gpu
        )
        needs.append(f"{policy!r} needs {footprint.needed / 2**30:.2f}")
        if footprint.needed <= device_bytes:
            break
    log.info(
        'engine.recomputation="auto" becomes %r: of %.2f GiB, %s by the plan',
        policy,
        device_bytes / 2**30,
        ", ".join(needs),
    )
    return policy


def as_it_will_train(
    planner: Planner,
    ds: DsConfig,
    device_bytes: float,
    *,
    compute: torch.dtype | None = None,
    on_gpu: bool = True,
) -> Planner:
    """The planner of the activation checkpointing that `engine.recomputation="auto"` will choose; the same one where it is chosen already."""
    if planner.experiment.engine.recomputation != "auto" or not recomputing_backbones(planner.model):
        return planner
    return planner.under(least_recomputation(planner, ds, device_bytes, compute=compute, on_gpu=on_gpu))


def agreed_recomputation(
    planner: Planner, ds: DsConfig, world: World, compute: torch.dtype
) -> Recomputation | Literal["config"]:
    """What `engine.recomputation` comes to: "auto" by the rank with the least free memory. Collective where it is "auto"; all ranks get the same.

    A backbone that cannot recompute by our policies (those of mmseg) is left to its config's `with_cp`, and so is a model that cannot be planned, with a line
    in the log.
    """
    if (asked := planner.experiment.engine.recomputation) != "auto":
        return asked
    if not recomputing_backbones(planner.model):
        return "config"
    least, chosen = min(of_all_ranks(free_memory(world.device, processes_here(world)))), "config"
    if world.is_main:
        try:
            chosen = least_recomputation(
                planner, ds, least, compute=compute, on_gpu=world.device.type == "cuda"
            )
        except Exception as error:  # whatever a part of somebody's model refuses with: no reason not to train
            log.info(
                'engine.recomputation="auto" cannot be planned, so the backbone\'s with_cp decides: %s',
                reason_of(error),
            )
    return of_all_ranks(chosen)[0]
