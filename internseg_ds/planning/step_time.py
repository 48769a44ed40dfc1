"""How long an optimizer step takes, from its FLOPs (`flops`), its traffic (`collectives`) and the data sheets
(`devices`): a calculation with named assumptions, no measurement.

Where `overlap_comm` is set, a micro-batch under ZeRO-3 takes the longer of its computation and its
communication. ZeRO-1 and 2 hide less: their gradients go out during the backward pass, each bucket after the
one before (deepspeedai/DeepSpeed#8364), and the last after all of it. Batch norms' exchanges always wait, and
so does what follows the last backward pass: the update, and the gathering of new weights. Work that waits for
memory and not for multipliers (deformable sampling, depth-wise convolutions) counts by its FLOPs like all
other, which is too short a time for backbones made of it.

`engine.compile` saves memory traffic of the blocks' elementwise work, and float8 products run at another rate
and cost conversions: both are added to that time, counted by hand, and nothing of it was measured on a GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from internseg_ds.moment_formats import OptimizerStates
from internseg_ds.planning.block_work import BlockPass, BlockWork
from internseg_ds.planning.collectives import Collective, Traffic
from internseg_ds.planning.devices import Cluster, Device
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
# counted in the same way, with each compiled function as one operation
COMPILED_COMPACT_BYTES: dict[tuple[OptimizerStates, bool], int] = {
    ("bf16", False): 80,
    ("bf16", True): 110,
    ("8bit", False): 72,
    ("8bit", True): 102,
}
"""The same under `engine.compile`."""
# of the 30 in which the elementwise work of InternViT's block reads and writes a tensor as large as its input:
# layer scale, residual and norm become one, and q and k are not copied (docs/performance.md, 10); twice as many
# in the backward pass. Other blocks are taken for like it
FUSED_PASSES = 9
"""Times that a compiled block reads or writes a tensor of its input's size less often, in a forward pass."""
# bf16 in and e4m3 out, and a reading before it for the scales (5), which uncompiled operations make with a
# bf16 copy of the scaled values and a copy that is contiguous
CONVERSION_BYTES = {False: 13, True: 5}
"""Bytes of traffic per element that is converted to float8, by whether the block is compiled."""
BF16_BYTES = 2


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
    trained: parameters that train. matrices: rows and columns of those that Muon trains. blocks: of one image,
    where they are compiled, or multiply in float8. compiled_update: whether formats of fewer bits are converted
    by compiled functions."""

    image: TrainingPass
    micro_batch: int
    traffic: Traffic
    trained: int
    host_bytes: int = 0
    heads: MatmulKind = "tf32"
    matrices: Sequence[tuple[int, int]] = ()
    blocks: BlockWork | None = None
    compiled: bool = False
    float8: bool = False
    compiled_update: bool = False


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
    """The time of one optimizer step on each GPU of the cluster. Raises ValueError for float8 products on a
    device whose data sheet has no rate of them."""
    device = cluster.device
    forward, backward = computation(work, device, assumed)
    floor, compute = forward.floor + backward.floor, forward.seconds + backward.seconds
    total = communication = 0.0
    for collectives in work.traffic.micro_batches:
        always_waits = communication_seconds(
            (part for part in collectives if part.what == "batch norm"), cluster, assumed
        )
        may_hide = [part for part in collectives if part.what != "batch norm"]
        hideable = communication_seconds(may_hide, cluster, assumed)
        communication += always_waits + hideable
        total += always_waits + _overlapped(compute, backward.seconds, hideable, may_hide, settings)
    after = communication_seconds(work.traffic.after, cluster, assumed)
    host = work.host_bytes / 1e9 / device.host_gbs / assumed.link
    update = update_seconds(work.trained, settings, cluster, assumed, compiled=work.compiled_update)
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


class PassTime(NamedTuple):
    """Seconds of a forward or backward pass of one micro-batch. floor: at the peak rate."""

    floor: float
    seconds: float


def computation(work: StepWork, device: Device, assumed: Assumptions) -> tuple[PassTime, PassTime]:
    """The forward and the backward pass of one micro-batch, the second with what is recomputed. Raises as
    `step_time` does."""
    image, blocks = work.image, work.blocks
    # a backward pass has twice the elementwise work of a forward pass
    of_forward = [] if blocks is None else [(blocks.forward, FUSED_PASSES)]
    of_backward = (
        [] if blocks is None else [(blocks.backward, 2 * FUSED_PASSES), (blocks.recomputed, FUSED_PASSES)]
    )
    return (
        _pass_time(image.backbone_forward, image.heads_forward, of_forward, work, device, assumed),
        _pass_time(image.backbone_backward, image.heads_backward, of_backward, work, device, assumed),
    )


def _pass_time(
    backbone_flops: int,
    heads_flops: int,
    blocks: Sequence[tuple[BlockPass, int]],
    work: StepWork,
    device: Device,
    assumed: Assumptions,
) -> PassTime:
    """blocks: with the passes over a tensor that compiling saves in each."""
    floor = backbone_flops / device.bf16 + heads_flops / getattr(device, work.heads)
    traffic = 0.0
    for one, fused in blocks:
        if work.float8:
            if device.float8 is None:
                raise ValueError(f"{device.name} has no rate of float8 products")
            floor += one.float8_flops * (1 / device.float8 - 1 / device.bf16)
            converted = work.micro_batch * one.converted + one.converted_weights
            traffic += CONVERSION_BYTES[work.compiled] * converted
        if work.compiled:
            traffic -= fused * BF16_BYTES * work.micro_batch * one.block_elements
    floor *= work.micro_batch / 1e12
    seconds = floor / assumed.compute + traffic / 1e9 / device.memory_gbs / assumed.link
    return PassTime(floor, max(floor, seconds))


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


def update_seconds(
    trained: int, settings: ZeroSettings, cluster: Cluster, assumed: Assumptions, *, compiled: bool
) -> float:
    """Adam's pass over its share of the state, at the speed of the memory that holds it."""
    by_format = COMPILED_COMPACT_BYTES if compiled else COMPACT_BYTES
    touched = by_format.get((settings.optimizer_states, settings.bf16_master), ADAM_BYTES)
    share = touched * trained / settings.optimizer_ranks
    if settings.optimizer_offloaded:
        bandwidth = assumed.host_memory_gbs / cluster.per_node
    else:
        bandwidth = cluster.device.memory_gbs
    return share / 1e9 / bandwidth / assumed.link
