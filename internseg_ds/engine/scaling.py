"""What one experiment will take on clusters of several sizes: `planning`'s numbers put together, for `launch/plan.py`.

In: an experiment, a ds_config and the clusters. Out: numbers per number of nodes, and a table of them. Takes no accelerator and reads no data.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from internseg_ds.distributed.construction import build_on_meta, choose_recomputation
from internseg_ds.distributed.ds_config import resolve_ds_config
from internseg_ds.distributed.parameter_groups import parameter_groups
from internseg_ds.engine.experiment import Experiment
from internseg_ds.errors import ConfigError
from internseg_ds.models.blocks import repeated_block
from internseg_ds.planning.communication import host_bytes, step_traffic
from internseg_ds.planning.memory import training_state_bytes
from internseg_ds.planning.step_time import Assumptions, Cluster, StepTime, step_time
from internseg_ds.planning.training_pass import TrainingPass, training_pass


@dataclass(frozen=True)
class Row:
    """One number of nodes. Bytes are per GPU; of training state, and sent in one optimizer step. keeps_batch: whether the recipe's batch could be kept."""

    cluster: Cluster
    global_batch: int
    accumulation: int
    keeps_batch: bool
    gpu_state: int
    host_state: int
    within_node: float
    between_nodes: float
    time: StepTime
    hours: float

    @property
    def images_per_s(self) -> float:
        return self.global_batch / self.time.step


@dataclass(frozen=True)
class Scaling:
    """An experiment under one ds_config on clusters of one kind."""

    experiment: Experiment
    source: str
    precision: str
    stage: int
    passed: TrainingPass
    crop: tuple[int, int]
    assumed: Assumptions
    rows: tuple[Row, ...]


def plan_scaling(experiment: Experiment, ds_config: str | os.PathLike | Mapping[str, Any], clusters: Sequence[Cluster], assumed: Assumptions) -> Scaling:
    """Raises ConfigError for what `resolve_ds_config` refuses, an unknown crop size, and settings whose cost is not modelled.

    Where the recipe's batch (`engine.global_batch`) cannot be made of a cluster's processes, each takes one micro-batch per step, or as many as stay below
    it; then the hours are those of as many images, not as many steps.
    """
    model = build_on_meta(experiment.model)
    choose_recomputation(model, experiment.engine.recomputation)
    crop = crop_size(experiment)
    if experiment.engine.backbone_dtype == "float32":
        raise ConfigError("engine.backbone_dtype='float32' cannot be planned: the times are of a backbone that computes in bfloat16; drop it")
    passed = training_pass(model, *crop)
    group_sizes = [sum(param.numel() for param in group["params"]) for group in parameter_groups(model, experiment.optimizer)]
    rows = []
    for cluster in clusters:
        batch, accumulation = experiment.engine.global_batch, experiment.accumulation
        keeps = batch is None or batch % (cluster.world_size * experiment.micro_batch) == 0
        if not keeps:
            batch, accumulation = None, max(1, batch // (cluster.world_size * experiment.micro_batch))
        ds = resolve_ds_config(
            ds_config, experiment=experiment.path, micro_batch=experiment.micro_batch, world_size=cluster.world_size, optimizer=experiment.optimizer,
            global_batch=batch, accumulation=accumulation, gradient_clipping=experiment.gradient_clipping, hidden_size=getattr(model.backbone, "embed_dim", 1024),
            block=repeated_block(model.backbone))
        if ds.precision == "fp32":
            raise ConfigError(f"{ds.source} trains in fp32, which the plan does not know; enable bf16 or torch_autocast")
        zero, width = ds.raw["zero_optimization"], 2 if ds.precision == "bf16" else 4
        traffic = step_traffic(model, passed.uses, group_sizes, zero, width=width, world_size=ds.world_size, accumulation=ds.accumulation)
        links = [part.sent_by_link(cluster.per_node) for part in traffic]
        moved = host_bytes(model, traffic, zero, width=width, world_size=ds.world_size)
        time = step_time(passed, ds.micro_batch, traffic, sum(group_sizes), moved, zero, cluster, assumed)
        state = training_state_bytes(model, ds.raw, ds.precision, ds.world_size)
        images = experiment.max_steps * (experiment.engine.global_batch or ds.global_batch)
        rows.append(Row(
            cluster, ds.global_batch, ds.accumulation, keeps,
            gpu_state=sum(size for _, size, place in state if place == "accelerator"), host_state=sum(size for _, size, place in state if place == "cpu"),
            within_node=sum(within for within, _ in links), between_nodes=sum(between for _, between in links),
            time=time, hours=images / ds.global_batch * time.step / 3600))
    return Scaling(experiment, ds.source, ds.precision, ds.stage, passed, crop, assumed, tuple(rows))


def crop_size(experiment: Experiment) -> tuple[int, int]:
    """Height and width of the training images, in pixels, from the last step of the pipeline that fixes them. Raises ConfigError when none does."""
    train = experiment.train[0] if isinstance(experiment.train, list) else experiment.train
    while "dataset" in train:  # RepeatDataset and its like
        train = train["dataset"]
    for step in reversed(train.get("pipeline", ())):
        for key in ("crop_size", "size"):
            if step.get("type") in ("RandomCrop", "Pad") and isinstance(step.get(key), (list, tuple)):
                return tuple(step[key])
    raise ConfigError(f"the size of a training image cannot be told: data.train.pipeline of {experiment.path} has neither RandomCrop.crop_size nor Pad.size; add one")


def describe_scaling(plan: Scaling, console: Console) -> None:
    """Prints the table, a column per number of nodes, and below it what it rests on."""
    first, gib, gb = plan.rows[0].cluster, 2**30, 1e9
    table = Table("nodes", title=f"{plan.experiment.name}\n{plan.source}: ZeRO-{plan.stage}, {plan.precision}\n{first.per_node} x {first.device.name} per node, "
                                 f"{first.between_gbs:g} GB/s per GPU between nodes")
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
    console.print(table)
    passed, assumed = plan.passed, plan.assumed
    console.print(f"TFLOP per {plan.crop[0]} x {plan.crop[1]} image: backbone {passed.backbone_flops / 1e12:.3g}, of which {passed.backbone_recomputed / 1e12:.3g} recomputed; heads "
                  f"{passed.heads_flops / 1e12:.3g}.")
    console.print("state: weights, gradients, optimizer; activations and gathered weights come on top. sent: per GPU and step. floor: computation at the GPU's peak. waiting: "
                  "share of the step that is not computation.")
    console.print(f"Planned, not measured. Assumed: {assumed.compute:.0%} of the peak ({first.device.bf16:g} TFLOP/s in bf16 for the backbone, {first.device.tf32:g} in TF32 for the heads), "
                  f"{assumed.link:.0%} of each link ({first.device.nvlink_gbs:g} GB/s within a node), {1e6 * assumed.hop_within_s:g} and {1e6 * assumed.hop_between_s:g} us per hop of a ring, and "
                  "communication of a micro-batch hidden behind its computation where overlap_comm is set.")
    if not all(row.keeps_batch for row in plan.rows):
        console.print(f"*: the recipe's {plan.experiment.engine.global_batch} images per step cannot be kept; hours are for as many images as its "
                      f"{plan.experiment.max_steps:,} steps see. Its learning rate and score are not for such a batch.")
