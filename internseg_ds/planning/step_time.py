"""How long an optimizer step takes, from its FLOPs (`flops`), its traffic (`collectives`) and the data sheets
(`devices`): a calculation with named assumptions, no measurement.

Where `overlap_comm` is set, a micro-batch under ZeRO-3 takes the longer of its computation and its
communication. ZeRO-1 and 2 hide less: their gradients go out during the backward pass, each bucket after the
one before (deepspeedai/DeepSpeed#8364), and the last after all of it. Batch norms' exchanges always wait, and
so does what follows the last backward pass: the update, and the gathering of new weights. Work that waits for
memory and not for multipliers (deformable sampling, depth-wise convolutions) counts by its FLOPs like all
other, which is too short a time for backbones made of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from internseg_ds.moment_formats import OptimizerStates
from internseg_ds.planning.collectives import Collective, Traffic
from internseg_ds.planning.devices import Cluster
from internseg_ds.planning.flops import TrainingPass
from internseg_ds.planning.zero_settings import ZeroSettings

MatmulKind = Literal["bf16", "tf32", "fp32"]
"""What a GPU multiplies matrices in; fields of `Device`."""

# fp32 master weight and two moments, read and written (24), fp32 gradient read (4), bf16 gradient read (2)
# and bf16 weight written (2); by what AdamW computes with, not measured
ADAM_BYTES = 32
"""Bytes of memory traffic per parameter of an update."""
# tensors that PyTorch's operators read and write in an update by `optimization.compact_adam`, counted
COMPACT_BYTES: dict[tuple[OptimizerStates, bool], int] = {
    ("bf16", False): 128,
    ("bf16", True): 182,
    ("8bit", False): 297,
    ("8bit", True): 351,
}
"""The same where moments are held in fewer bits, by their format and whether the weights are bf16 too."""


@dataclass(frozen=True)
class Assumptions:
    """Rates that no data sheet has. `benchmarks/on_one_gpu.py --report` fits them to what a GPU reached."""

    # a guess: nothing was measured yet
    compute: float = 0.45
    """Share of the peak TFLOP/s that is reached."""
    # a guess
    link: float = 0.8
    """Share of a link's or a memory's bandwidth that is reached."""
    # guesses; a ring takes as many hops as it has ranks, for each collective
    hop_within_s: float = 1e-6
    """Seconds that a message of any size takes from one GPU to the next within a node."""
    hop_between_s: float = 5e-6
    """The same, between nodes."""
    # data sheets: 16 channels of DDR5-4800 have 614 GB/s
    host_memory_gbs: float = 600.0
    """GB/s of a node's host memory, which its processes share."""


@dataclass(frozen=True)
class StepWork:
    """What one process does in an optimizer step. image: of one image; micro_batch: images. heads: what they
    are computed in; the backbone is in bf16. host_bytes: between GPU and host (`collectives.host_bytes`).
    trained: parameters that train. matrices: rows and columns of those that Muon trains."""

    image: TrainingPass
    micro_batch: int
    traffic: Traffic
    trained: int
    host_bytes: int = 0
    heads: MatmulKind = "tf32"
    matrices: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. floor: computation at the peak rate. communication: all of it, hidden or
    not. host: copies to and from the host. total: of the step, with what is hidden counted once."""

    floor: float
    compute: float
    communication: float
    host: float
    update: float
    total: float

    @property
    def waiting(self) -> float:
        """Seconds in which communication holds the step up."""
        return self.total - self.compute - self.host - self.update

    @property
    def not_computing(self) -> float:
        """Share of the step in which no forward or backward pass computes."""
        return 1 - self.compute / self.total


def step_time(work: StepWork, settings: ZeroSettings, cluster: Cluster, assumed: Assumptions) -> StepTime:
    """The time of one optimizer step on each GPU of the cluster."""
    image, device = work.image, cluster.device
    heads_rate: float = getattr(device, work.heads)
    # one micro-batch at the peak rate, and its backward pass alone
    floor = work.micro_batch * (image.backbone_flops / device.bf16 + image.heads_flops / heads_rate) / 1e12
    backward_floor = (
        work.micro_batch * (image.backbone_backward / device.bf16 + image.heads_backward / heads_rate) / 1e12
    )
    compute = floor / assumed.compute
    backward = backward_floor / assumed.compute
    total = communication = 0.0
    for collectives in work.traffic.micro_batches:
        always_waits = communication_seconds(
            (part for part in collectives if part.what == "batch norm"), cluster, assumed
        )
        may_hide = [part for part in collectives if part.what != "batch norm"]
        hideable = communication_seconds(may_hide, cluster, assumed)
        communication += always_waits + hideable
        total += always_waits + _overlapped(compute, backward, hideable, may_hide, settings)
    after = communication_seconds(work.traffic.after, cluster, assumed)
    host = work.host_bytes / 1e9 / device.host_gbs / assumed.link
    update = update_seconds(work.trained, settings, cluster, assumed)
    update += (
        newton_schulz_flops(work.matrices) / settings.world_size / (device.bf16 * 1e12) / assumed.compute
    )
    count = len(work.traffic.micro_batches)
    return StepTime(
        floor=count * floor,
        compute=count * compute,
        communication=communication + after,
        host=host,
        update=update,
        total=total + after + host + update,
    )


def _overlapped(
    compute: float,
    backward: float,
    communication: float,
    collectives: Iterable[Collective],
    settings: ZeroSettings,
) -> float:
    """Seconds of one micro-batch. compute: of forward and backward pass; backward: of the latter alone;
    communication: of `collectives`."""
    if not settings.overlaps:
        return compute + communication
    if settings.stage == 3:
        return max(compute, communication)
    # the last bucket of gradients is full when the backward pass is over
    last = communication / max(1, sum(part.calls for part in collectives if part.what == "gradients"))
    return compute - backward + max(backward, communication - last) + last


def communication_seconds(collectives: Iterable[Collective], cluster: Cluster, assumed: Assumptions) -> float:
    """Of collectives that follow each other: the slower link's bytes, and a ring's hops for each call."""
    total = 0.0
    for part in collectives:
        if part.ranks == 1:
            continue
        within, between = part.sent_by_link(cluster.per_node)
        nodes = max(1, part.ranks // cluster.per_node)
        hops_s = (part.ranks - nodes) * assumed.hop_within_s
        if nodes > 1:
            hops_s += nodes * assumed.hop_between_s
        # an all-reduce goes around the ring twice: a reduce-scatter, then an all-gather
        rounds = 2 if part.kind == "all_reduce" else 1
        slower = max(within / cluster.device.nvlink_gbs, between / cluster.between_gbs) / 1e9
        total += slower / assumed.link + part.calls * rounds * hops_s
    return total


def newton_schulz_flops(matrices: Sequence[tuple[int, int]]) -> int:
    """Of the 5 iterations of Muon, each of which has three products: X X^T, its square, and that times X. (The
    method "gram" needs fewer for matrices that are not square.)"""
    sides = [(min(matrix), max(matrix)) for matrix in matrices]
    return sum(5 * (4 * small**2 * large + 2 * small**3) for small, large in sides)


def update_seconds(trained: int, settings: ZeroSettings, cluster: Cluster, assumed: Assumptions) -> float:
    """Adam's pass over its share of the state, at the speed of the memory that holds it."""
    touched = COMPACT_BYTES.get((settings.optimizer_states, settings.bf16_master), ADAM_BYTES)
    share = touched * trained / settings.optimizer_ranks
    if settings.optimizer_offloaded:
        bandwidth = assumed.host_memory_gbs / cluster.per_node
    else:
        bandwidth = cluster.device.memory_gbs
    return share / 1e9 / bandwidth / assumed.link
