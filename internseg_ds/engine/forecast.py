"""What one experiment will take on one cluster: memory part by part, time, disk; under each of several ds_configs, and which of them fit.

In: an experiment, ds_configs, a cluster and its memory. Out: `Forecast`s, tables of them, and the sentence by which `train.py` warns. Takes no accelerator.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from internseg_ds.distributed.device_memory import device_memory, processes_here
from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.distributed.precision import backbone_dtype
from internseg_ds.distributed.process_group import World
from internseg_ds.engine.auto_recomputation import FASTEST_FIRST, as_it_will_train
from internseg_ds.engine.planner import Planner, Row
from internseg_ds.engine.scaling import assumptions, flops
from internseg_ds.errors import ConfigError
from internseg_ds.models.recomputation import Recomputation, recomputing_backbones
from internseg_ds.planning.footprint import Footprint, checkpoint_bytes
from internseg_ds.planning.memory import Part
from internseg_ds.planning.step_time import Assumptions, Cluster

log = logging.getLogger(__name__)

GIB = 2**30
PHASES = {"train": "forward and backward", "update": "optimizer's step", "evaluate": "evaluation"}


@dataclass(frozen=True)
class Forecast:
    """One ds_config on one cluster. planner: of the experiment with the activation checkpointing that it will have. host_bytes: memory of a host, None where
    unknown. row: None where the time is not modelled, `untimed` says why. unit: what a process runs on."""

    planner: Planner
    ds: DsConfig
    footprint: Footprint
    per_node: int
    device_bytes: float
    host_bytes: float | None = None
    row: Row | None = None
    untimed: str = ""
    unit: str = "GPU"

    @property
    def host(self) -> int:
        """Bytes of one host."""
        return self.footprint.host * self.per_node

    @property
    def fits_device(self) -> bool:
        return self.footprint.needed <= self.device_bytes

    @property
    def fits_host(self) -> bool:
        return self.host_bytes is None or self.host <= self.host_bytes

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host


def forecast(planner: Planner, ds_config: str | os.PathLike, cluster: Cluster, assumed: Assumptions, device_bytes: float, host_bytes: float | None) -> Forecast:
    """Raises ConfigError where `resolve_ds_config` does for this number of processes."""
    ds, _ = planner.resolve(ds_config, cluster.world_size)
    planner = as_it_will_train(planner, ds, device_bytes)
    try:
        row, untimed = planner.row(ds_config, cluster, assumed), ""
    except ConfigError as error:
        row, untimed = None, str(error)
    return Forecast(planner, ds, planner.footprint(ds, device_bytes), cluster.per_node, device_bytes, host_bytes, row, untimed)


def compare(planner: Planner, ds_configs: Sequence[Path], cluster: Cluster, assumed: Assumptions, device_bytes: float,
            host_bytes: float | None) -> dict[Path, Forecast | str]:
    """A forecast for each ds_config, or the sentence by which it is refused."""
    found: dict[Path, Forecast | str] = {}
    for path in ds_configs:
        try:
            found[path] = forecast(planner, path, cluster, assumed, device_bytes, host_bytes)
        except ConfigError as error:
            found[path] = str(error).splitlines()[0]
    return found


def wide_console() -> Console:
    """At least 110 columns: a table that is cut off says nothing."""
    return Console(width=max(Console().width, 110))


def brief(value: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def memory_table(plan: Forecast, title: str) -> Table:
    """Of one process, phase by phase."""
    footprint = plan.footprint
    table = Table(title=title)
    table.add_column(f"GiB per {plan.unit}, and per host", no_wrap=True)
    for name in (*PHASES, "host"):
        table.add_column(name, justify="right")

    def amount(size: int) -> str:
        return f"{size / GIB:.2f}" if size else ""

    for name in dict.fromkeys(part.name for part in footprint.parts if part.device or part.host or part.nvme):
        same = [part for part in footprint.parts if part.name == name]
        nvme = sum(part.nvme for part in same)
        table.add_row(name + (f" ({nvme / GIB:.2f} on NVMe)" if nvme else ""),
                      *(amount(sum(part.device for part in same if phase in part.phases)) for phase in PHASES),
                      amount(sum(part.host for part in same) * plan.per_node))
    table.add_section()
    table.add_row("together", *(amount(footprint.device(phase)) for phase in PHASES), amount(plan.host))
    if footprint.margin:
        table.add_row("to stay free", *[amount(footprint.margin)] * len(PHASES), "")
    return table


def verdict(plan: Forecast) -> str:
    """A sentence: the peak, and whether it fits."""
    footprint = plan.footprint
    free = f", of which {footprint.margin / GIB:.1f} should stay free" if footprint.margin else ""
    said = (f"Peak: {footprint.peak / GIB:.1f} GiB per {plan.unit} ({PHASES[footprint.fullest]}) of {plan.device_bytes / GIB:.1f}{free}: "
            f"{'fits' if plan.fits_device else 'does not fit'}.")
    if plan.host_bytes is not None:
        said += f" {plan.host / GIB:.0f} GiB per host of {plan.host_bytes / GIB:.0f}: {'fits' if plan.fits_host else 'does not fit'}."
    return said


def describe_forecast(plan: Forecast, cluster: Cluster, console: Console) -> None:
    """Prints what one ds_config takes on the cluster: memory, work, time, disk."""
    planner, ds, row, footprint = plan.planner, plan.ds, plan.row, plan.footprint
    gpus = f"{cluster.world_size} x {cluster.device.name}"
    console.print(memory_table(plan, f"{planner.experiment.name}\n{ds.source}: ZeRO-{ds.stage}, {ds.precision}, {gpus}, {ds.micro_batch} images per GPU"))
    console.print(verdict(plan))
    console.print(f"Recomputed in the backbone: {planner.recomputation}"
                  + (", chosen by memory." if planner.experiment.engine.recomputation == "auto" else "."))
    console.print(flops(planner.passed, planner.crop))
    console.print(f"Disk: {brief(footprint.checkpoint / GIB)} GiB per checkpoint, {brief(footprint.consolidated / GIB)} GiB for its consolidated fp32 file.")
    if row is None:
        console.print(f"Time: not planned. {plan.untimed}")
    else:
        console.print(f"Step: {row.global_batch} images = {cluster.world_size} GPUs x {ds.micro_batch} x {row.accumulation} accumulation steps "
                      f"in {brief(row.time.step)} s ({brief(row.images_per_s)} images/s); floor {brief(row.time.floor)} s, "
                      f"computation {brief(row.time.compute)} s, communication {brief(row.time.communication)} s, "
                      f"copies to and from the host {brief(row.time.host)} s, update {brief(row.time.update)} s. "
                      f"Sent per GPU and step: {brief(row.within_node / 1e9)} GB within a node, "
                      f"{brief(row.between_nodes / 1e9)} GB between nodes. {brief(row.hours)} hours for the schedule.")
        if not row.keeps_batch:
            console.print(f"The recipe's {planner.experiment.engine.global_batch} images per step cannot be kept; hours are for as many images as its "
                          f"{planner.experiment.max_steps:,} steps see.")


def describe_comparison(planner: Planner, found: dict[Path, Forecast | str], cluster: Cluster, assumed: Assumptions, console: Console) -> None:
    """Prints a line for each ds_config, and which fit and is fastest."""
    table = Table(title=f"ds_configs on {cluster.world_size} x {cluster.device.name}")
    table.add_column("ds_config", no_wrap=True)
    for name in ("GPU, GiB", "host, GiB", "fits", "step, s", "img/s", "hours"):
        table.add_column(name, justify="right")
    chosen = planner.experiment.engine.recomputation == "auto"
    if chosen:
        table.add_column("recomputes")
    for path, plan in found.items():
        if isinstance(plan, str):
            table.add_row(path.stem, "", "", "no")
            continue
        timed = ("", "", "") if plan.row is None else (brief(plan.row.time.step), brief(plan.row.images_per_s), brief(plan.row.hours))
        table.add_row(path.stem, f"{plan.footprint.peak / GIB:.1f}", f"{plan.host / GIB:.0f}", "yes" if plan.fits else "no", *timed,
                      *[str(plan.planner.recomputation)] * chosen)
    console.print(table)
    for path, plan in found.items():
        if isinstance(plan, str):
            console.print(f"{path.stem}: {plan}")
    console.print(conclusion(found))
    console.print(assumptions(planner.experiment, cluster, assumed))


def fastest(found: Mapping[Path, Forecast | str]) -> Path | None:
    """The ds_config that fits and takes least time, None where none is timed. Of those that take as long, to two digits: first without offloading, then in
    bf16, then the one that leaves more memory."""
    timed = {path: plan for path, plan in found.items() if isinstance(plan, Forecast) and plan.fits and plan.row is not None}
    return min(timed, default=None, key=lambda path: (
        float(f"{timed[path].row.time.step:.2g}"), timed[path].row.host_state > 0, timed[path].ds.precision != "bf16", timed[path].footprint.peak))


def conclusion(found: dict[Path, Forecast | str]) -> str:
    """A sentence: which ds_configs fit, and which of them is fastest; where steps take as long (within 1 %), the one that leaves more memory."""
    fitting = {path: plan for path, plan in found.items() if isinstance(plan, Forecast) and plan.fits}
    if not fitting:
        return "None of these ds_configs fits. Use more GPUs or larger ones, fewer images per GPU (data.samples_per_gpu), or smaller crops."
    names = ", ".join(path.stem for path in fitting)
    if (best := fastest(found)) is None:
        return f"These fit: {names}."
    return f"These fit: {names}. Fastest: {best.stem}, {brief(fitting[best].row.time.step)} s a step, {brief(fitting[best].row.images_per_s)} images/s."


def of_this_run(planner: Planner, ds: DsConfig, world: World, *, validate: bool) -> Forecast:
    """The memory of a run on the device of this process."""
    size, compute = device_memory(world), backbone_dtype(planner.experiment.engine.backbone_dtype, world.device, ds.precision)
    on_gpu = world.device.type == "cuda"
    planner = as_it_will_train(planner, ds, size, compute=compute, on_gpu=on_gpu)
    return Forecast(planner, ds, planner.footprint(ds, size, compute=compute, validate=validate, on_gpu=on_gpu), processes_here(world), size,
                    unit="GPU" if on_gpu else "process")


def shortfall(planner: Planner, ds: DsConfig, world: World) -> str | None:
    """The sentence by which a run is warned that it will not fit into its device's memory, with the mend; None when it fits. Never raises.

    A model that is small beside the memory is not looked at closely, and evaluations, which take fewer windows where there is less room, are not looked at:
    the start of a run is not to wait.
    """
    try:
        device = world.device
        size, compute = device_memory(world), backbone_dtype(planner.experiment.engine.backbone_dtype, device, ds.precision)
        if planner.is_small_beside(ds, size):
            return None
        on_gpu = device.type == "cuda"
        chosen = as_it_will_train(planner, ds, size, compute=compute, on_gpu=on_gpu)
        found = chosen.footprint(ds, size, compute=compute, validate=False, exact=False, on_gpu=on_gpu)
        if found.needed <= size:
            return None
        largest: Part = max((part for part in found.parts if found.fullest in part.phases), key=lambda part: part.device)
        said = (f"this run will not fit by the plan: it needs {found.peak / GIB:.1f} GiB per {'GPU' if device.type == 'cuda' else 'process'} "
                f"({PHASES[found.fullest]}) and there are {size / GIB:.1f}{f', of which {found.margin / GIB:.1f} should stay free' if on_gpu else ''}; "
                f"the largest part is {largest.name}, {largest.device / GIB:.1f} GiB")
        return f"{said}; {_mend(planner, ds, world, size, compute)}"
    except Exception as error:  # an odd model is no reason not to train it
        log.info("whether this run fits into memory could not be planned: %s: %s", type(error).__name__, error)
        return None


def no_room_to_save(planner: Planner, ds: DsConfig, work_dir: Path) -> str | None:
    """The sentence by which a run is warned that its disk has no room for a checkpoint; None where it has, or cannot be asked, or holds a part only (node-local
    storage). A warning only: what is free may change."""
    if (ds.raw.get("checkpoint") or {}).get("use_node_local_storage"):
        return None
    ema = planner.experiment.engine.ema is not None
    needed = checkpoint_bytes(planner.model, ds.raw["zero_optimization"].get("stage", 0), ds.param_dtype.itemsize, ema=ema)
    try:
        free = shutil.disk_usage(next(folder for folder in (work_dir, *work_dir.absolute().parents) if folder.is_dir())).free
    except OSError:
        return None
    if needed <= free:
        return None
    return (f"there is no room for a checkpoint: each takes {needed / GIB:.1f} GiB and {free / GIB:.1f} are free in {work_dir}; make room, choose another "
            "--work-dir, or train with --no-save to measure only")


def after_out_of_memory(planner: Planner, ds: DsConfig, world: World, recomputation: Recomputation | Literal["config"]) -> str:
    """What the plan had said of a run that has run out of memory, and what would take less. recomputation: what it trains with. Never raises."""
    try:
        size, compute = device_memory(world), backbone_dtype(planner.experiment.engine.backbone_dtype, world.device, ds.precision)
        on_gpu = world.device.type == "cuda"

        def of(under: Planner) -> Footprint:
            return under.footprint(ds, size, compute=compute, validate=False, exact=False, on_gpu=on_gpu)

        had = planner if recomputation == "config" else planner.under(recomputation)
        found = of(had)
        said = (f"Out of memory. The plan had said {found.peak / GIB:.1f} GiB of {size / GIB:.1f} per {'GPU' if on_gpu else 'process'} "
                f"({PHASES[found.fullest]}), with {had.recomputation!r} recomputed")
        less = [(policy, of(planner.under(policy))) for policy in FASTEST_FIRST] if recomputing_backbones(planner.model) else []
        less = sorted(((policy, other) for policy, other in less if other.peak < found.peak), key=lambda pair: max(0, pair[1].needed - size))
        mends = [f"engine.recomputation={policy!r} ({other.peak / GIB:.1f} GiB by the plan)" for policy, other in less[:1]]
        if planner.experiment.micro_batch > 1:
            mends.append("a smaller data.samples_per_gpu, with engine.global_batch to keep the recipe's batch")
        mends.append("a ds_config that keeps less on the device (launch/plan.py compares them)")
        return f"{said}. To need less: {'; '.join(mends)}."
    except Exception as error:  # the error that ends the run is another one
        return f"Out of memory. What the plan had said cannot be told: {type(error).__name__}: {error}"


def _mend(planner: Planner, ds: DsConfig, world: World, size: int, compute: torch.dtype) -> str:
    """What to do: the ds_config beside this one that fits with the least on the host, else what else makes a run smaller."""
    on_gpu = world.device.type == "cuda"
    fitting, beside = [], sorted(Path(ds.source).parent.glob("*.json")) if Path(ds.source).is_file() else []
    for path in beside:
        try:
            other, _ = planner.resolve(path, world.size)
            chosen = as_it_will_train(planner, other, size, compute=compute, on_gpu=on_gpu)
            found = chosen.footprint(other, size, compute=compute, validate=False, exact=False, on_gpu=on_gpu)
        except ConfigError:
            continue
        if other.precision == ds.precision and found.needed <= size:
            fitting.append((found.host, found.peak, path))
    if fitting:
        host, peak, path = min(fitting)
        return f"{path} would need {peak / GIB:.1f} GiB" + (f" and {host / GIB:.0f} GiB of the host's memory per process" if host > 5 * GIB else "")
    return ("none of the ds_configs beside it would fit: " * bool(beside)
            + "use more GPUs, offload, or take fewer images per GPU (data.samples_per_gpu), smaller crops, "
              "or activation checkpointing (engine.recomputation=\"blocks\") if it is off")
