"""What one experiment will take on one cluster: memory part by part, time, disk; under each of several ds_configs, and which of them fit.

In: an experiment, ds_configs, a cluster and its memory. Out: `Forecast`s and tables of them. Takes no accelerator.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from internseg_ds.distributed.device_memory import device_memory, processes_here
from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.distributed.precision import backbone_dtype
from internseg_ds.distributed.process_group import World
from internseg_ds.engine.auto_recomputation import as_it_will_train
from internseg_ds.engine.planner import Planner, Row
from internseg_ds.engine.scaling import assumptions, flops
from internseg_ds.errors import ConfigError
from internseg_ds.planning.footprint import Footprint
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


def forecast(
    planner: Planner,
    ds_config: str | os.PathLike,
    cluster: Cluster,
    assumed: Assumptions,
    device_bytes: float,
    host_bytes: float | None,
) -> Forecast:
    """Raises ConfigError where `resolve_ds_config` does for this number of processes."""
    ds, _ = planner.resolve(ds_config, cluster.world_size)
    planner = as_it_will_train(planner, ds, device_bytes)
    try:
        row, untimed = planner.row(ds_config, cluster, assumed), ""
    except ConfigError as error:
        row, untimed = None, str(error)
    return Forecast(
        planner,
        ds,
        planner.footprint(ds, device_bytes),
        cluster.per_node,
        device_bytes,
        host_bytes,
        row,
        untimed,
    )


def compare(
    planner: Planner,
    ds_configs: Sequence[Path],
    cluster: Cluster,
    assumed: Assumptions,
    device_bytes: float,
    host_bytes: float | None,
) -> dict[Path, Forecast | str]:
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
        table.add_row(
            name + (f" ({nvme / GIB:.2f} on NVMe)" if nvme else ""),
            *(amount(sum(part.device for part in same if phase in part.phases)) for phase in PHASES),
            amount(sum(part.host for part in same) * plan.per_node),
        )
    table.add_section()
    table.add_row("together", *(amount(footprint.device(phase)) for phase in PHASES), amount(plan.host))
    if footprint.margin:
        table.add_row("to stay free", *[amount(footprint.margin)] * len(PHASES), "")
    return table


def left_free(footprint: Footprint) -> str:
    """What follows the size of a device's memory in a sentence."""
    return f", of which {footprint.margin / GIB:.1f} should stay free" if footprint.margin else ""


def verdict(plan: Forecast) -> str:
    """A sentence: the peak, and whether it fits."""
    footprint = plan.footprint
    said = (
        f"Peak: {footprint.peak / GIB:.1f} GiB per {plan.unit} ({PHASES[footprint.fullest]}) of {plan.device_bytes / GIB:.1f}{left_free(footprint)}: "
        f"{'fits' if plan.fits_device else 'does not fit'}."
    )
    if plan.host_bytes is not None:
        said += f" {plan.host / GIB:.0f} GiB per host of {plan.host_bytes / GIB:.0f}: {'fits' if plan.fits_host else 'does not fit'}."
    return said


def describe_forecast(plan: Forecast, cluster: Cluster, console: Console) -> None:
    """Prints what one ds_config takes on the cluster: memory, work, time, disk."""
    planner, ds, row, footprint = plan.planner, plan.ds, plan.row, plan.footprint
    gpus = f"{cluster.world_size} x {cluster.device.name}"
    console.print(
        memory_table(
            plan,
            f"{planner.experiment.name}\n{ds.source}: ZeRO-{ds.stage}, {ds.precision}, {gpus}, {ds.micro_batch} images per GPU",
        )
    )
    console.print(verdict(plan))
    console.print(
        f"Recomputed in the backbone: {planner.recomputation}"
        + (", chosen by memory." if planner.experiment.engine.recomputation == "auto" else ".")
    )
    console.print(flops(planner.passed, planner.crop))
    console.print(
        f"Disk: {brief(footprint.checkpoint / GIB)} GiB per checkpoint, {brief(footprint.consolidated / GIB)} GiB for its consolidated fp32 file."
    )
    if row is None:
        console.print(f"Time: not planned. {plan.untimed}")
    else:
        console.print(
            f"Step: {row.global_batch} images = {cluster.world_size} GPUs x {ds.micro_batch} x {row.accumulation} accumulation steps "
            f"in {brief(row.time.step)} s ({brief(row.images_per_s)} images/s); floor {brief(row.time.floor)} s, "
            f"computation {brief(row.time.compute)} s, communication {brief(row.time.communication)} s, "
            f"copies to and from the host {brief(row.time.host)} s, update {brief(row.time.update)} s. "
            f"Sent per GPU and step: {brief(row.within_node / 1e9)} GB within a node, "
            f"{brief(row.between_nodes / 1e9)} GB between nodes. {brief(row.hours)} hours for the schedule."
        )
        if not row.keeps_batch:
            console.print(
                f"The recipe's {planner.experiment.engine.global_batch} images per step cannot be kept; hours are for as many images as its "
                f"{planner.experiment.max_steps:,} steps see."
            )


def describe_comparison(
    planner: Planner,
    found: dict[Path, Forecast | str],
    cluster: Cluster,
    assumed: Assumptions,
    console: Console,
) -> None:
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
        timed = (
            ("", "", "")
            if plan.row is None
            else (brief(plan.row.time.step), brief(plan.row.images_per_s), brief(plan.row.hours))
        )
        table.add_row(
            path.stem,
            f"{plan.footprint.peak / GIB:.1f}",
            f"{plan.host / GIB:.0f}",
            "yes" if plan.fits else "no",
            *timed,
            *[str(plan.planner.recomputation)] * chosen,
        )
    console.print(table)
    for path, plan in found.items():
        if isinstance(plan, str):
            console.print(f"{path.stem}: {plan}")
    console.print(conclusion(found))
    console.print(assumptions(planner.experiment, cluster, assumed))


def fastest(found: Mapping[Path, Forecast | str]) -> Path | None:
    """The ds_config that fits and takes least time, None where none is timed. Of those that take as long, to two digits: first without offloading, then in
    bf16, then the one that leaves more memory."""
    timed = {
        path: plan
        for path, plan in found.items()
        if isinstance(plan, Forecast) and plan.fits and plan.row is not None
    }
    return min(
        timed,
        default=None,
        key=lambda path: (
            float(f"{timed[path].row.time.step:.2g}"),
            timed[path].row.host_state > 0,
            timed[path].ds.precision != "bf16",
            timed[path].footprint.peak,
        ),
    )


def conclusion(found: dict[Path, Forecast | str]) -> str:
    """A sentence: which ds_configs fit, and which of them is fastest; where steps take as long (within 1 %), the one that leaves more memory."""
    fitting = {path: plan for path, plan in found.items() if isinstance(plan, Forecast) and plan.fits}
    if not fitting:
        return "None of these ds_configs fits. Use more GPUs or larger ones, fewer images per GPU (data.samples_per_gpu), or smaller crops."
    names = ", ".join(path.stem for path in fitting)
    if (best := fastest(found)) is None:
        return f"These fit: {names}."
    return f"These fit: {names}. Fastest: {best.stem}, {brief(fitting[best].row.time.step)} s a step, {brief(fitting[best].row.images_per_s)} images/s."


@dataclass(frozen=True)
class Device:
    """What a process runs on. size: bytes of its memory; compute: the dtype that the backbone computes in there; on_gpu: whether it is a GPU."""

    size: int
    compute: torch.dtype
    on_gpu: bool

    @classmethod
    def of_this_run(cls, planner: Planner, ds: DsConfig, world: World) -> "Device":
        compute = backbone_dtype(planner.experiment.engine.backbone_dtype, world.device, ds.precision)
        return cls(device_memory(world), compute, world.device.type == "cuda")

    @property
    def unit(self) -> str:
        return "GPU" if self.on_gpu else "process"

    def planner(self, planner: Planner, ds: DsConfig) -> Planner:
        """Of the activation checkpointing that a run will have here."""
        return as_it_will_train(planner, ds, self.size, compute=self.compute, on_gpu=self.on_gpu)

    def footprint(
        self, planner: Planner, ds: DsConfig, *, validate: bool = False, exact: bool = False
    ) -> Footprint:
        """By default without evaluation, and by the upper bound of gathered weights: quickly."""
        return planner.footprint(
            ds, self.size, compute=self.compute, validate=validate, exact=exact, on_gpu=self.on_gpu
        )


def of_this_run(planner: Planner, ds: DsConfig, world: World, *, validate: bool) -> Forecast:
    """The memory of a run on the device of this process."""
    device = Device.of_this_run(planner, ds, world)
    planner = device.planner(planner, ds)
    return Forecast(
        planner,
        ds,
        device.footprint(planner, ds, validate=validate, exact=True),
        processes_here(world),
        device.size,
        unit=device.unit,
    )
