"""Estimates in words: tables and sentences for a console. No arithmetic but units."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from internseg_ds.errors import counted
from internseg_ds.planning.estimate import Estimate, StepEstimate, fastest, heads_matmul, whole_or_partitioned
from internseg_ds.planning.memory_estimate import MemoryEstimate, Platform
from internseg_ds.planning.zero_memory import Part, Phase

GIB = 2**30
GB = 1e9
PHASES: dict[Phase, str] = {
    "train": "forward and backward",
    "update": "optimizer's step",
    "evaluate": "evaluation",
}


def wide_console() -> Console:
    """At least 110 columns: a table that is cut off says nothing."""
    return Console(width=max(Console().width, 110))


def brief(value: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def memory_table(memory: MemoryEstimate, title: str) -> Table:
    """Of one process, phase by phase."""
    table = Table(title=title)
    table.add_column(f"GiB per {memory.platform.unit}, and per host", no_wrap=True)
    for name in (*PHASES, "host"):
        table.add_column(name, justify="right")
    for name in dict.fromkeys(part.name for part in memory.parts if part.device or part.host or part.nvme):
        table.add_row(*_memory_row([part for part in memory.parts if part.name == name], memory.platform))
    table.add_section()
    table.add_row("together", *(_gib(memory.device(phase)) for phase in PHASES), _gib(memory.whole_host))
    if margin := memory.platform.margin:
        table.add_row("to stay free", *[_gib(margin)] * len(PHASES), "")
    return table


def _memory_row(parts: Sequence[Part], platform: Platform) -> list[str]:
    """parts: of one name."""
    nvme = sum(part.nvme for part in parts)
    return [
        parts[0].name + (f" ({nvme / GIB:.2f} on NVMe)" if nvme else ""),
        *(_gib(sum(part.device for part in parts if phase in part.phases)) for phase in PHASES),
        _gib(sum(part.host for part in parts) * platform.per_host),
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def free_margin(platform: Platform) -> str:
    """What follows the size of a device's memory in a sentence."""
    return f", of which {platform.margin / GIB:.1f} should stay free" if platform.margin else ""


def verdict(memory: MemoryEstimate) -> str:
    """A sentence: the peak, and whether it fits."""
    platform = memory.platform
    device = (
        f"Peak: {memory.peak / GIB:.1f} GiB per {platform.unit} ({PHASES[memory.fullest]}) of "
        f"{platform.device_bytes / GIB:.1f}{free_margin(platform)}: {_fits(memory.fits_device)}."
    )
    if platform.host_bytes is None:
        return device
    return (
        f"{device} {memory.whole_host / GIB:.0f} GiB per host of {platform.host_bytes / GIB:.0f}: "
        f"{_fits(memory.fits_host)}."
    )


def _fits(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def print_estimate(estimate: Estimate, console: Console) -> None:
    """Memory, work, disk and time under one ds_config."""
    ds, cluster = estimate.ds, estimate.cluster
    engine = estimate.experiment.engine
    console.print(
        memory_table(
            estimate.memory,
            f"{estimate.experiment.name}\n{ds.source}: ZeRO-{ds.stage}, {ds.precision}, "
            f"{cluster.world_size} x {cluster.device.name}, {counted(ds.micro_batch, 'image')} per GPU",
        )
    )
    console.print(verdict(estimate.memory))
    chosen = ", chosen by memory" if engine.recomputation == "auto" else ""
    console.print(f"Recomputed in the backbone: {estimate.checkpointing}{chosen}.")
    console.print(_work(estimate))
    console.print(
        f"Disk: {brief(estimate.memory.checkpoint / GIB)} GiB per checkpoint, "
        f"{brief(estimate.memory.consolidated / GIB)} GiB for its consolidated fp32 file."
    )
    if estimate.step is None:
        console.print(f"Time: no estimate. {estimate.untimed}")
        return
    console.print(_step(estimate, estimate.step))
    if not estimate.keeps_batch:
        console.print(_batch_not_kept(estimate))


def _work(estimate: Estimate) -> str:
    image, (height, width) = estimate.image, estimate.crop
    return (
        f"TFLOP per {height} x {width} image: backbone {image.backbone_flops / 1e12:.3g}, "
        f"of which {image.backbone_recomputed / 1e12:.3g} recomputed; heads {image.heads_flops / 1e12:.3g}."
    )


def _step(estimate: Estimate, step: StepEstimate) -> str:
    ds, time = estimate.ds, step.time
    return (
        f"Step: {counted(ds.global_batch, 'image')} = {counted(estimate.cluster.world_size, 'GPU')} x "
        f"{ds.micro_batch} x {counted(ds.accumulation, 'accumulation step')} "
        f"in {brief(time.total)} s ({brief(step.images_per_s)} images/s); floor {brief(time.floor)} s, "
        f"computation {brief(time.compute)} s, communication {brief(time.communication)} s, "
        f"copies to and from the host {brief(time.host)} s, update {brief(time.update)} s. "
        f"Sent per GPU and step: {brief(step.within_node / GB)} GB within a node, "
        f"{brief(step.between_nodes / GB)} GB between nodes. {_hours(step) or 'Not known how many'} hours for the "
        "schedule" + ("." if step.hours is not None else ", which counts epochs: no data set is read here.")
    )


def _hours(step: StepEstimate) -> str:
    return "" if step.hours is None else brief(step.hours)


def _batch_not_kept(estimate: Estimate) -> str:
    return (
        f"The recipe's {estimate.experiment.engine.global_batch} images per step cannot be kept; "
        f"hours are for as many images as its {estimate.experiment.max_steps:,} steps see."
    )


def print_comparison(found: Mapping[Path, Estimate | str], given: Estimate, console: Console) -> None:
    """A line for each ds_config, and which fit and is fastest. given: the estimate that the others are
    compared with, on the same cluster."""
    chosen = given.experiment.engine.recomputation == "auto"
    table = Table(title=f"ds_configs on {given.cluster.world_size} x {given.cluster.device.name}")
    table.add_column("ds_config", no_wrap=True)
    for name in ("GPU, GiB", "host, GiB", "fits", "step, s", "img/s", "hours"):
        table.add_column(name, justify="right")
    if chosen:
        table.add_column("recomputes")
    for path, one in found.items():
        if isinstance(one, str):
            table.add_row(path.stem, "", "", "no")
        else:
            table.add_row(path.stem, *_comparison_cells(one), *([str(one.checkpointing)] if chosen else []))
    console.print(table)
    for path, one in found.items():
        if isinstance(one, str):
            console.print(f"{path.stem}: {one}")
    console.print(conclusion(found))
    if advice := frozen_weights(found):
        console.print(advice)
    console.print(_assumptions(given))


def print_without_zero(memory: MemoryEstimate, console: Console) -> None:
    """Says where a run needs no ZeRO. memory: of `estimate.without_zero`."""
    if memory.fits:
        console.print(
            f"It fits without ZeRO, too: {memory.peak / GIB:.1f} GiB per GPU with everything whole on each. On "
            "such models a step of plain DDP is the faster one: on CPUs ours took 1.2 to 1.6 times its time "
            "(docs/against_others.md)."
        )


def _comparison_cells(estimate: Estimate) -> list[str]:
    memory, step = estimate.memory, estimate.step
    return [
        f"{memory.peak / GIB:.1f}",
        f"{memory.whole_host / GIB:.0f}",
        "yes" if memory.fits else "no",
        "" if step is None else brief(step.time.total),
        "" if step is None else brief(step.images_per_s),
        "" if step is None else _hours(step),
    ]


def conclusion(found: Mapping[Path, Estimate | str]) -> str:
    """Which ds_configs fit, and which of them is fastest (`estimate.fastest`)."""
    fitting = {path: one for path, one in found.items() if not isinstance(one, str) and one.memory.fits}
    if not fitting:
        return (
            "None of these ds_configs fits. Use more GPUs or larger ones, fewer images per GPU "
            "(data.samples_per_gpu), or smaller crops."
        )
    names = f"These fit: {', '.join(path.stem for path in fitting)}."
    best = fastest(found)
    step = fitting[best].step if best is not None else None
    if best is None or step is None:
        return names
    return (
        f"{names} Fastest: {best.stem}, {brief(step.time.total)} s a step, "
        f"{brief(step.images_per_s)} images/s."
    )


def frozen_weights(found: Mapping[Path, Estimate | str]) -> str:
    """Whether ZeRO-1 or ZeRO-3 is better for weights most of which are frozen, by bytes
    (`estimate.whole_or_partitioned`); empty where that is no question."""
    if (both := whole_or_partitioned(found)) is None:
        return ""
    (whole_path, whole, whole_step), (partitioned_path, partitioned, partitioned_step) = both
    costs = " and ".join(
        f"{path.stem} sends {brief(_sent(step) / GB)} GB per GPU and step, in {brief(step.time.total)} s, and "
        f"takes {one.memory.peak / GIB:.1f} GiB"
        for path, one, step in both
    )
    if not whole.memory.fits:
        why = f"whole on each GPU they do not fit: ZeRO-3 ({partitioned_path.stem}) divides them"
        if not partitioned.memory.fits:
            why += ", which does not fit either"
    elif _sent(whole_step) < _sent(partitioned_step):
        why = (
            f"they fit whole on each GPU, where nothing gathers them: ZeRO-1 ({whole_path.stem}) sends least"
        )
    elif _sent(whole_step) > _sent(partitioned_step):
        why = f"ZeRO-1 would send more: ZeRO-3 ({partitioned_path.stem}) is better"
    else:
        least, _, _ = min(both, key=lambda entry: entry[1].memory.peak)
        why = f"ZeRO-3 sends as much as ZeRO-1: {least.stem} takes least memory"
    return f"{whole.frozen:.0%} of the weights are frozen, and {why}. {costs}."


def _sent(step: StepEstimate) -> float:
    """Bytes that each GPU sends in a step."""
    return step.within_node + step.between_nodes


def print_scaling(estimates: Sequence[Estimate], console: Console) -> None:
    """The table over clusters of several sizes, a column for each, and below it what it rests on. estimates:
    by `estimate_scaling`."""
    first = estimates[0]
    cluster, ds = first.cluster, first.ds
    table = Table(
        "nodes",
        title=f"{first.experiment.name}\n{ds.source}: ZeRO-{ds.stage}, {ds.precision}\n"
        f"{cluster.per_node} x {cluster.device.name} per node, {cluster.between_gbs:g} GB/s per GPU between "
        "nodes",
    )
    for one in estimates:
        table.add_column(f"{one.cluster.nodes}", justify="right")
    timed = [(one, one.step) for one in estimates if one.step is not None]
    for label, cell in SCALING_ROWS.items():
        table.add_row(label, *(cell(one, step) for one, step in timed))
    console.print(table)
    console.print(_work(first))
    console.print(
        "state: weights, gradients, optimizer; activations and gathered weights come on top (--gpus N "
        "shows them). "
        "sent: per GPU and step. floor: computation at the GPU's peak. waiting: share of the step that is "
        "not computation."
    )
    console.print(_assumptions(first))
    if not all(one.keeps_batch for one in estimates):
        console.print(f"*: {_batch_not_kept(first)} Its learning rate and score are not for such a batch.")


SCALING_ROWS: dict[str, Callable[[Estimate, StepEstimate], str]] = {
    "GPUs": lambda one, _: f"{one.cluster.world_size}",
    "images per step": lambda one, _: f"{one.ds.global_batch}{'' if one.keeps_batch else '*'}",
    "state, GiB per GPU": lambda one, _: f"{one.memory.state_on_device / GIB:.1f}",
    "state, GiB per host": lambda one, _: f"{one.memory.state_on_host * one.cluster.per_node / GIB:.0f}",
    "sent in node, GB": lambda _, step: f"{step.within_node / GB:.1f}",
    "sent between, GB": lambda _, step: f"{step.between_nodes / GB:.2f}",
    "floor, s": lambda _, step: f"{step.time.floor:.2f}",
    "computation, s": lambda _, step: f"{step.time.compute:.2f}",
    "communication, s": lambda _, step: f"{step.time.communication:.2f}",
    "step, s": lambda _, step: f"{step.time.total:.2f}",
    "waiting": lambda _, step: f"{step.time.not_computing:.0%}",
    "images/s": lambda _, step: f"{step.images_per_s:.0f}",
    "hours": lambda _, step: _hours(step),
    "recomputed": lambda one, _: f"{one.checkpointing}",
}


def _assumptions(estimate: Estimate) -> str:
    """What the seconds rest on."""
    device, assumed = estimate.cluster.device, estimate.assumed
    kind = heads_matmul(estimate.experiment.engine)
    heads = (
        " and the heads" if kind == "bf16" else f", {getattr(device, kind):g} in {kind.upper()} for the heads"
    )
    return (
        f"Estimated, not measured. Assumed: {assumed.compute:.0%} of the peak ({device.bf16:g} TFLOP/s in "
        f"bf16 for the backbone{heads}), "
        f"{assumed.link:.0%} of each link ({device.nvlink_gbs:g} GB/s within a node), "
        f"{1e6 * assumed.hop_within_s:g} and {1e6 * assumed.hop_between_s:g} us per hop of a ring, "
        "and communication hidden, where overlap_comm is set, behind a micro-batch's computation under "
        "ZeRO-3, its backward pass under ZeRO-1 and 2."
    )
