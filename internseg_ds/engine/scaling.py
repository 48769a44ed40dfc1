"""What one experiment will take on clusters of several sizes: `planner`'s numbers put together, for `launch/plan.py --nodes`.

In: an experiment, a ds_config and the clusters. Out: numbers per number of nodes, and a table of them. Takes no accelerator and reads no data.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.engine.auto_recomputation import as_it_will_train
from internseg_ds.engine.experiment import Experiment
from internseg_ds.engine.planner import Planner, Row, heads_products
from internseg_ds.models.recomputation import Recomputation
from internseg_ds.planning.step_time import Assumptions, Cluster
from internseg_ds.planning.training_pass import TrainingPass


@dataclass(frozen=True)
class Scaling:
    """An experiment under one ds_config on clusters of one kind."""

    experiment: Experiment
    ds: DsConfig
    passed: TrainingPass
    crop: tuple[int, int]
    assumed: Assumptions
    rows: tuple[Row, ...]
    recomputed: tuple[Recomputation, ...]
    """In the backbone, for each row."""


def plan_scaling(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    clusters: Sequence[Cluster],
    assumed: Assumptions,
) -> Scaling:
    """Raises ConfigError for what `resolve_ds_config` refuses, an unknown crop size, and settings whose cost is not modelled.

    Where the recipe's batch (`engine.global_batch`) cannot be made of a cluster's processes, each takes one micro-batch per step, or as many as stay below
    it; then the hours are those of as many images, not as many steps.
    """
    planner = Planner(experiment)
    resolved = [planner.resolve(ds_config, cluster.world_size)[0] for cluster in clusters]
    planners = [
        as_it_will_train(planner, ds, cluster.device.memory_gib * 2**30)
        for ds, cluster in zip(resolved, clusters, strict=True)
    ]
    rows = tuple(
        each.row(ds_config, cluster, assumed) for each, cluster in zip(planners, clusters, strict=True)
    )
    return Scaling(
        experiment,
        resolved[0],
        planners[0].passed,
        planner.crop,
        assumed,
        rows,
        tuple(each.recomputation for each in planners),
    )


def describe_scaling(plan: Scaling, console: Console) -> None:
    """Prints the table, a column per number of nodes, and below it what it rests on."""
    first, gib, gb = plan.rows[0].cluster, 2**30, 1e9
    table = Table(
        "nodes",
        title=f"{plan.experiment.name}\n{plan.ds.source}: ZeRO-{plan.ds.stage}, {plan.ds.precision}\n"
        f"{first.per_node} x {first.device.name} per node, {first.between_gbs:g} GB/s per GPU between nodes",
    )
    for row in plan.rows:
        table.add_column(f"{row.cluster.nodes}", justify="right")
    lines: dict[str, Callable[[Row], str]] = {
        "GPUs": lambda row: f"{row.cluster.world_size}",
        "images per step": lambda row: f"{row.global_batch}{'' if row.keeps_batch else '*'}",
        "state, GiB per GPU": lambda row: f"{row.gpu_state / gib:.1f}",
        "state, GiB per host": lambda row: f"{row.host_state * row.cluster.per_node / gib:.0f}",
        "sent in node, GB": lambda row: f"{row.within_node / gb:.1f}",
        "sent between, GB": lambda row: f"{row.between_nodes / gb:.2f}",
        "floor, s": lambda row: f"{row.time.floor:.2f}",
        "computation, s": lambda row: f"{row.time.compute:.2f}",
        "communication, s": lambda row: f"{row.time.communication:.2f}",
        "step, s": lambda row: f"{row.time.step:.2f}",
        "waiting": lambda row: f"{(row.time.waiting + row.time.host + row.time.update) / row.time.step:.0%}",
        "images/s": lambda row: f"{row.images_per_s:.0f}",
        "hours": lambda row: f"{row.hours:.1f}",
    }
    for label, shown in lines.items():
        table.add_row(label, *map(shown, plan.rows))
    table.add_row("recomputed", *map(str, plan.recomputed))
    console.print(table)
    console.print(flops(plan.passed, plan.crop))
    console.print(
        "state: weights, gradients, optimizer; activations and gathered weights come on top (--gpus N shows them). "
        "sent: per GPU and step. floor: computation at the GPU's peak. waiting: share of the step that is not computation."
    )
    console.print(assumptions(plan.experiment, first, plan.assumed))
    if not all(row.keeps_batch for row in plan.rows):
        console.print(
            f"*: the recipe's {plan.experiment.engine.global_batch} images per step cannot be kept; hours are for as many images as its "
            f"{plan.experiment.max_steps:,} steps see. Its learning rate and score are not for such a batch."
        )


def flops(passed: TrainingPass, crop: tuple[int, int]) -> str:
    """A sentence: the work of one training image."""
    return (
        f"TFLOP per {crop[0]} x {crop[1]} image: backbone {passed.backbone_flops / 1e12:.3g}, "
        f"of which {passed.backbone_recomputed / 1e12:.3g} recomputed; heads {passed.heads_flops / 1e12:.3g}."
    )


def assumptions(experiment: Experiment, cluster: Cluster, assumed: Assumptions) -> str:
    """What the seconds rest on."""
    device = cluster.device
    kind = heads_products(experiment.engine)
    heads = (
        " and the heads" if kind == "bf16" else f", {getattr(device, kind):g} in {kind.upper()} for the heads"
    )
    return (
        f"Planned, not measured. Assumed: {assumed.compute:.0%} of the peak ({device.bf16:g} TFLOP/s in bf16 for the backbone{heads}), "
        f"{assumed.link:.0%} of each link ({device.nvlink_gbs:g} GB/s within a node), "
        f"{1e6 * assumed.hop_within_s:g} and {1e6 * assumed.hop_between_s:g} us per hop of a ring, "
        "and communication hidden, where overlap_comm is set, behind a micro-batch's computation under ZeRO-3, its backward pass under ZeRO-1 and 2."
    )
