"""How long an optimizer step takes by the numbers of `training_pass`, `communication` and `devices`: a calculation with named assumptions, no measurement.

Assumed: a share `efficiency.compute` of the peak TFLOP/s, of each link's bandwidth `efficiency.link`, rings with a fixed time per hop, and, where
`overlap_comm` is set, that a micro-batch under ZeRO-3 takes the longer of its computation and its communication. ZeRO-1 and 2 hide less: their gradients
go out during the backward pass, each bucket after the one before (deepspeedai/DeepSpeed#8364), and the last after all of it. Batch norms' exchanges
always wait, and so does what follows the last backward pass: the update, and the gathering of new weights. Work that waits for memory and not for
multipliers (deformable sampling, depth-wise convolutions) counts by its FLOPs like all other, which is too short a time for backbones made of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from internseg_ds.planning.communication import Collective, Traffic
from internseg_ds.planning.devices import Device
from internseg_ds.planning.training_pass import TrainingPass

ADAM_BYTES = 32
"""Read and written per parameter by an update: master and two moments both ways (24), fp32 gradient (4), bf16 gradient and weight (4)."""


@dataclass(frozen=True)
class Assumptions:
    compute: float = 0.45
    """Share of the peak TFLOP/s that is reached."""
    link: float = 0.8
    """Share of a link's or a memory's bandwidth that is reached."""
    hop_within_s: float = 1e-6
    """Seconds that a message of any size takes from one GPU to the next within a node."""
    hop_between_s: float = 5e-6
    """The same, between nodes."""
    host_memory_gbs: float = 600.0
    """GB/s of a node's host memory, which its processes share: 16 channels of DDR5-4800 have 614."""


@dataclass(frozen=True)
class Cluster:
    """between_gbs: GB/s of one GPU's network adapter, one direction."""

    device: Device
    nodes: int
    per_node: int
    between_gbs: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. floor: computation at the peak rate. communication: all of it, hidden or not. host: copies to and from the host."""

    floor: float
    compute: float
    communication: float
    host: float
    update: float
    step: float

    @property
    def waiting(self) -> float:
        """Seconds in which communication holds the step up."""
        return self.step - self.compute - self.host - self.update


def seconds(collectives: Iterable[Collective], cluster: Cluster, assumed: Assumptions) -> float:
    """Of collectives that follow each other: the slower link's bytes, and a ring's hops for each call."""
    total = 0.0
    for part in collectives:
        if part.ranks == 1:
            continue
        within, between = part.sent_by_link(cluster.per_node)
        nodes = max(1, part.ranks // cluster.per_node)
        hops_s = (part.ranks - nodes) * assumed.hop_within_s + (
            nodes * assumed.hop_between_s if nodes > 1 else 0
        )
        rounds = 2 if part.kind == "all_reduce" else 1
        total += (
            max(within / cluster.device.nvlink_gbs, between / cluster.between_gbs) / 1e9 / assumed.link
            + part.calls * rounds * hops_s
        )
    return total


def step_time(
    passed: TrainingPass,
    micro_batch: int,
    traffic: Traffic,
    trained: int,
    host_bytes: int,
    zero: Mapping[str, Any],
    cluster: Cluster,
    assumed: Assumptions,
    *,
    heads: Literal["bf16", "tf32", "fp32"] = "tf32",
) -> StepTime:
    """passed: of one image; micro_batch: images; trained: parameters that train; host_bytes: by `communication.host_bytes`.

    heads: what they are computed in; the backbone is in bf16.
    """
    heads_rate = getattr(cluster.device, heads)
    floor = (
        micro_batch * (passed.backbone_flops / cluster.device.bf16 + passed.heads_flops / heads_rate) / 1e12
    )
    compute = floor / assumed.compute
    stage = zero.get("stage", 0)
    overlap = zero.get("overlap_comm", stage == 3)
    backward_share = (passed.backbone_backward / cluster.device.bf16 + passed.heads_backward / heads_rate) / (
        passed.backbone_flops / cluster.device.bf16 + passed.heads_flops / heads_rate
    )
    during = communicated = 0.0
    for collectives in traffic.micro_batches:
        behind = seconds((part for part in collectives if part.what != "batch norm"), cluster, assumed)
        inline = seconds((part for part in collectives if part.what == "batch norm"), cluster, assumed)
        if overlap and stage == 3:
            during += inline + max(compute, behind)
        elif overlap:
            last = behind / max(1, sum(part.calls for part in collectives if part.what == "gradients"))
            backward = compute * backward_share
            during += inline + compute - backward + max(backward, behind - last) + last
        else:
            during += inline + compute + behind
        communicated += inline + behind
    after = seconds(traffic.after, cluster, assumed)
    count = len(traffic.micro_batches)
    moved = host_bytes / 1e9 / cluster.device.host_gbs / assumed.link
    update = update_seconds(trained, zero, cluster, assumed)
    return StepTime(
        count * floor, count * compute, communicated + after, moved, update, during + after + moved + update
    )


def update_seconds(trained: int, zero: Mapping[str, Any], cluster: Cluster, assumed: Assumptions) -> float:
    """Adam's pass over its share of the state, at the speed of the memory that holds it."""
    share = ADAM_BYTES * trained / (cluster.world_size if zero.get("stage", 0) else 1)
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    bandwidth = assumed.host_memory_gbs / cluster.per_node if offloaded else cluster.device.memory_gbs
    return share / 1e9 / bandwidth / assumed.link
