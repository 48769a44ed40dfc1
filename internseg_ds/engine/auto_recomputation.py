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
from internseg_ds.models.recomputation import Recomputation

log = logging.getLogger(__name__)

FASTEST_FIRST: tuple[Recomputation, ...] = ("none", "all_but_matmuls", 2, "blocks")


def least_recomputation(planner: Planner, ds: DsConfig, device_bytes: float, *, compute: torch.dtype | None = None) -> Recomputation:
    """The first policy of `FASTEST_FIRST` under which forward, backward and update fit into a device of so many bytes; the last one where none does.

    compute: the dtype that the backbone computes in, None for that of GPUs. An evaluation is no reason to recompute: it takes what room there is. Raises
    ConfigError for a backbone without activation checkpointing.
    """
    needs: list[str] = []
    for policy in FASTEST_FIRST:
        footprint = planner.under(policy).footprint(ds, device_bytes, compute=compute, validate=False, exact=False)
        needs.append(f"{policy!r} needs {footprint.peak / 2**30:.2f}")
        if footprint.peak <= device_bytes:
            break
    log.info("engine.recomputation=\"auto\" becomes %r: of %.2f GiB, %s by the plan", policy, device_bytes / 2**30, ", ".join(needs))
    return policy


def agreed_recomputation(planner: Planner, ds: DsConfig, world: World, compute: torch.dtype) -> Recomputation | Literal["config"]:
    """What `engine.recomputation` comes to: "auto" by the rank with the least free memory. Collective where it is "auto"; all ranks get the same.

    A model that cannot be planned is left to its config's `with_cp`, with a line in the log.
    """
    if (asked := planner.experiment.engine.recomputation) != "auto":
        return asked
    least, chosen = min(of_all_ranks(free_memory(world.device, processes_here(world)))), "config"
    if world.is_main:
        try:
            chosen = least_recomputation(planner, ds, least, compute=compute)
        except Exception as error:  # whatever a part of somebody's model refuses with: no reason not to train
            log.warning("engine.recomputation=\"auto\" cannot be planned, so the backbone's with_cp decides: %s: %s", type(error).__name__, error)
    return of_all_ranks(chosen)[0]
