"""What a run is told of memory and disk beside the plan: that it will not fit, with a mend, and what the plan had said when memory ran out all the same.

In: a `Planner`, a ds_config and this process's place. Out: sentences. Takes no accelerator.
"""

import logging
import shutil
from pathlib import Path
from typing import Literal

from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.distributed.process_group import World
from internseg_ds.engine.auto_recomputation import FASTEST_FIRST
from internseg_ds.engine.forecast import GIB, PHASES, Device, left_free
from internseg_ds.engine.planner import Planner
from internseg_ds.errors import ConfigError, reason_of
from internseg_ds.models.recomputation import Recomputation, recomputing_backbones
from internseg_ds.planning.footprint import checkpoint_bytes
from internseg_ds.planning.memory import Part

log = logging.getLogger(__name__)


def shortfall(planner: Planner, ds: DsConfig, world: World) -> str | None:
    """The sentence by which a run is warned that it will not fit into its device's memory, with the mend; None when it fits. Never raises.

    A model that is small beside the memory is not looked at closely, and evaluations, which take fewer windows where there is less room, are not looked at:
    the start of a run is not to wait.
    """
    try:
        device = Device.of_this_run(planner, ds, world)
        if planner.is_small_beside(ds, device.size):
            return None
        found = device.footprint(device.planner(planner, ds), ds)
        if found.needed <= device.size:
            return None
        largest: Part = max(
            (part for part in found.parts if found.fullest in part.phases), key=lambda part: part.device
        )
        said = (
            f"this run will not fit by the plan: it needs {found.peak / GIB:.1f} GiB per {device.unit} ({PHASES[found.fullest]}) and there are "
            f"{device.size / GIB:.1f}{left_free(found)}; the largest part is {largest.name}, {largest.device / GIB:.1f} GiB"
        )
        return f"{said}; {_mend(planner, ds, world, device)}"
    except Exception as error:  # an odd model is no reason not to train it
        log.info("whether this run fits into memory could not be planned: %s", reason_of(error))
        return None


def no_room_to_save(planner: Planner, ds: DsConfig, work_dir: Path) -> str | None:
    """The sentence by which a run is warned that its disk has no room for a checkpoint; None where it has, or cannot be asked, or holds a part only (node-local
    storage). A warning only: what is free may change."""
    if (ds.raw.get("checkpoint") or {}).get("use_node_local_storage"):
        return None
    ema = planner.experiment.engine.ema is not None
    needed = checkpoint_bytes(
        planner.model, ds.raw["zero_optimization"].get("stage", 0), ds.param_dtype.itemsize, ema=ema
    )
    try:
        free = shutil.disk_usage(
            next(folder for folder in (work_dir, *work_dir.absolute().parents) if folder.is_dir())
        ).free
    except OSError:
        return None
    if needed <= free:
        return None
    return (
        f"there is no room for a checkpoint: each takes {needed / GIB:.1f} GiB and {free / GIB:.1f} are free in {work_dir}; make room, choose another "
        "--work-dir, or train with --no-save to measure only"
    )


def after_out_of_memory(
    planner: Planner, ds: DsConfig, world: World, recomputation: Recomputation | Literal["config"]
) -> str:
    """What the plan had said of a run that has run out of memory, and what would take less. recomputation: what it trains with. Never raises."""
    try:
        device = Device.of_this_run(planner, ds, world)
        had = planner if recomputation == "config" else planner.under(recomputation)
        found = device.footprint(had, ds)
        said = (
            f"Out of memory. The plan had said {found.peak / GIB:.1f} GiB of {device.size / GIB:.1f} per {device.unit} "
            f"({PHASES[found.fullest]}), with {had.recomputation!r} recomputed"
        )
        policies = FASTEST_FIRST if recomputing_backbones(planner.model) else ()
        all_of_them = ((policy, device.footprint(planner.under(policy), ds)) for policy in policies)
        less = sorted(
            (pair for pair in all_of_them if pair[1].peak < found.peak),
            key=lambda pair: max(0, pair[1].needed - device.size),
        )
        mends = [
            f"engine.recomputation={policy!r} ({other.peak / GIB:.1f} GiB by the plan)"
            for policy, other in less[:1]
        ]
        if planner.experiment.micro_batch > 1:
            mends.append(
                "a smaller data.samples_per_gpu, with engine.global_batch to keep the recipe's batch"
            )
        mends.append("a ds_config that keeps less on the device (launch/plan.py compares them)")
        return f"{said}. To need less: {'; '.join(mends)}."
    except Exception as error:  # the error that ends the run is another one
        return f"Out of memory. What the plan had said cannot be told: {reason_of(error)}"


def _mend(planner: Planner, ds: DsConfig, world: World, device: Device) -> str:
    """What to do: the ds_config beside this one that fits with the least on the host, else what else makes a run smaller."""
    fitting, beside = [], sorted(Path(ds.source).parent.glob("*.json")) if Path(ds.source).is_file() else []
    for path in beside:
        try:
            other, _ = planner.resolve(path, world.size)
            found = device.footprint(device.planner(planner, other), other)
        except ConfigError:
            continue
        if other.precision == ds.precision and found.needed <= device.size:
            fitting.append((found.host, found.peak, path))
    if fitting:
        host, peak, path = min(fitting)
        return f"{path} would need {peak / GIB:.1f} GiB" + (
            f" and {host / GIB:.0f} GiB of the host's memory per process" if host > 5 * GIB else ""
        )
    return (
        "none of the ds_configs beside it would fit: "
        * bool(beside)
        + "use more GPUs, offload, or take fewer images per GPU (data.samples_per_gpu), smaller crops, "
        'or activation checkpointing (engine.recomputation="blocks") if it is off'
    )
