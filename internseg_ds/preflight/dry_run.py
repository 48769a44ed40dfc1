"""What `--dry-run` shows of a run that has passed every check."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from internseg_ds.errors import counted, reason_of
from internseg_ds.optimization.parameter_groups import parameter_groups
from internseg_ds.planning.auto_checkpointing import as_it_will_train
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import Platform
from internseg_ds.planning.tables import memory_table, verdict
from internseg_ds.preflight.image_sizes import size_lines
from internseg_ds.preflight.preflight import Plan


def describe(plan: Plan, console: Console) -> None:
    """Prints what the config says for nothing, parameters by part, groups, weights, batches, data, and the
    memory of a process."""
    sizes, warnings = size_lines(plan.experiment, plan.crop)
    for line in (*plan.experiment.warnings, *warnings, *plan.experiment.notes):
        console.print(f"config: {line}", markup=False, highlight=False, soft_wrap=True)
    counts = Table("part", "parameters", "of which train", title=f"{plan.experiment.name}: model")
    for name, child in [*plan.meta_model.named_children(), ("all", plan.meta_model)]:
        params = list(child.parameters())
        counts.add_row(
            name,
            f"{sum(p.numel() for p in params):,}",
            f"{sum(p.numel() for p in params if p.requires_grad):,}",
        )
    console.print(counts)
    console.print(groups_table(parameter_groups(plan.meta_model, plan.experiment.optimizer)))
    ds, experiment = plan.ds, plan.experiment
    # a path is no markup, and stays in one piece
    console.print(f"weights: {_weights(plan)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"images: {sizes}", soft_wrap=True)
    console.print(
        f"batch: {counted(ds.global_batch, 'image')} per step = {counted(ds.world_size, 'process')} x "
        f"{counted(ds.micro_batch, 'image')} x {counted(ds.accumulation, 'accumulation step')}"
    )
    console.print(
        f"data: {len(plan.train_set):,} training images, "
        f"{len(plan.val_set) if plan.val_set is not None else 0:,} validation images; "
        f"{experiment.max_steps:,} steps = "
        f"{experiment.max_steps * ds.global_batch / len(plan.train_set):,.1f} epochs"
    )
    for note in plan.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True, style="yellow")
    try:
        platform = Platform.of_this_process(experiment, ds, plan.world)
        estimator = as_it_will_train(Estimator(experiment, plan.meta_model, crop=plan.crop), ds, platform)
        memory = estimator.memory(ds, platform, evaluates=plan.val_set is not None)
    except Exception as error:  # an odd model is no reason not to train it
        console.print(
            f"the memory of this run cannot be planned: {reason_of(error)}; where that is of its forward, "
            "training will end there too",
            markup=False,
            soft_wrap=True,
        )
        return
    console.print(
        memory_table(
            memory,
            f"{ds.source}: ZeRO-{ds.stage}, {ds.precision}, {ds.world_size} "
            f"process{'es' * (ds.world_size > 1)}",
        )
    )
    console.print(f"Recomputed in the backbone: {estimator.checkpointing}.")
    console.print(f"{verdict(memory)} {memory.checkpoint / 2**30:.3g} GiB on disk per checkpoint.")
    console.print(
        "planned, not measured; nothing was taken from any accelerator. launch/plan.py compares "
        "ds_configs, GPUs and their numbers"
    )


def groups_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each parameter group, and one for layers in a row that differ in their learning rate alone.

    groups: as of `parameter_groups`.
    """
    table = Table("group", "tensors", "parameters", "lr", "weight decay", title="parameter groups")
    for run in _layers_in_a_row(groups):
        first, last = run[0], run[-1]
        name, rate, each = first["name"], f"{first['lr']:.3g}", ""
        if len(run) > 1:
            (start, kind), (end, _) = _layer_and_kind(first), _layer_and_kind(last)
            name, rate, each = f"layers {start}-{end}{kind}", f"{rate} - {last['lr']:.3g}", " each"
        tensors, parameters, weight_decay = _sizes(first)
        table.add_row(name, f"{tensors}{each}", f"{parameters:,}{each}", rate, f"{weight_decay:g}")
    return table


def _layers_in_a_row(groups: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    runs: list[list[Mapping[str, Any]]] = []
    for group in groups:
        layer, kind = _layer_and_kind(group)
        for run in runs:
            if (
                layer is not None
                and _layer_and_kind(run[-1]) == (layer - 1, kind)
                and _sizes(run[-1]) == _sizes(group)
            ):
                run.append(group)
                break
        else:
            runs.append([group])
    return runs


def _layer_and_kind(group: Mapping[str, Any]) -> tuple[int, str] | tuple[None, str]:
    """The number in the name of a group of layer-wise decay, and what follows it; None for other groups."""
    found = re.match(r"layer (\d+)(.*)", group["name"])
    return (int(found[1]), found[2]) if found else (None, group["name"])


def _sizes(group: Mapping[str, Any]) -> tuple[int, int, float]:
    """Tensors, elements and weight decay of a group."""
    return len(group["params"]), sum(param.numel() for param in group["params"]), group["weight_decay"]


def _weights(plan: Plan) -> str:
    if plan.resume_from is not None:
        return f"those of {plan.resume_from}, where training goes on"
    return (
        "random"
        if plan.weights is None
        else f"{plan.weights.weights.path}: {plan.weights.summary('to load')}"
    )
