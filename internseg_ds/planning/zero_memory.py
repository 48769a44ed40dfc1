"""Bytes per process of what ZeRO keeps and passes through in training: weights, gradients, optimizer,
buckets, gathered weights, and their counterparts on the host.

Sources: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020),
table 1: with Adam, bf16 training keeps 2 + 2 + 12 bytes per parameter, of which stage 1 divides the
optimizer's 12 by the number of processes, stage 2 the gradients too, stage 3 all. hpZ keeps a second copy of
the weights, divided over a node (Wang et al., "ZeRO++", 2023). Where DeepSpeed 0.19.8 keeps more or less, its
code is named below; `tests/planning/test_zero_memory_counted.py` compares the sums with what a real engine
keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from internseg_ds.allocator import pinned_bytes
from internseg_ds.optimization.compact_adam import CHUNK
from internseg_ds.planning.flops import Use
from internseg_ds.planning.gathered_weights import GatherSettings, gathers, persistent
from internseg_ds.planning.zero_settings import (
    Place,
    ZeroSettings,
    total_elements,
    trained_elements,
    trained_sizes,
)

Phase = Literal["train", "update", "evaluate"]
"""Forward and backward passes of the last micro-batch; the optimizer's step; an evaluation."""
ALWAYS: tuple[Phase, ...] = ("train", "update", "evaluate")

MOMENT = 4
"""Bytes of one fp32 moment; Muon keeps one of the elements of its matrices, where Adam keeps two."""
UPDATED_CHUNK = 32
"""Bytes for each element of `optimization.compact_adam.CHUNK`: weight, gradient and moments in fp32, and the
copies in which a moment becomes its code."""
GATHERED = "gathered weights"
"""The name of the part that an evaluation has, too, where ranks gather weights layer by layer."""


@dataclass(frozen=True)
class Part:
    """One line of a table of memory. device, host, nvme: bytes of one process. phases: when it is there."""

    name: str
    device: int = 0
    host: int = 0
    nvme: int = 0
    phases: tuple[Phase, ...] = ALWAYS

    @classmethod
    def at(cls, name: str, size: int, place: Place, phases: tuple[Phase, ...] = ALWAYS) -> "Part":
        """A part of `size` bytes that lies at one place."""
        if place == "nvme":
            return cls(name, nvme=size, phases=phases)
        if place == "cpu":
            return cls(name, host=size, phases=phases)
        return cls(name, device=size, phases=phases)


def model_states(
    model: nn.Module, settings: ZeroSettings, matrices: Sequence[tuple[int, int]] = ()
) -> list[Part]:
    """Weights, gradients and optimizer of a model with Adam, and hpZ's copy of the weights. The ZeRO paper's
    12 bytes of optimizer state are fp32 master weights and two fp32 moments; other formats take fewer.

    matrices: rows and columns of those parameters that Muon trains, of which there is one moment.
    Frozen parameters have weights only. Parameters in fp32 (precision "autocast", "fp32") are their own
    master weights under ZeRO-0, and have a partitioned fp32 copy beside them under ZeRO-1 to 3: stage3.py
    intends to save that copy, but compares a device with its name, which are never equal.
    """
    width = settings.bytes_per_weight
    total = total_elements(model)
    trained = trained_elements(model)
    parts = [
        Part.at("weights", width * total // settings.weight_ranks, settings.weights_at),
        *_gradients(width * trained, settings),
        Part.at(
            "optimizer",
            (int(settings.optimizer_bytes * trained) - MOMENT * elements(matrices))
            // settings.optimizer_ranks,
            settings.optimizer_at,
        ),
    ]
    if settings.optimizer_offloaded and settings.stage:
        # stage3.py, `initialize_optimizer_states`; stage_1_and_2.py, where a bf16 copy of the new weights is
        # kept on the host too
        copies = 4 if settings.stage == 3 else 4 + width
        parts.append(
            Part.at("gradients in fp32", copies * trained // settings.world_size, settings.optimizer_at)
        )
    if settings.stage == 3 and settings.node_size > 1:
        parts.append(Part.at("second copy (hpZ)", width * total // settings.node_size, settings.weights_at))
    return parts


def _gradients(whole: int, settings: ZeroSettings) -> list[Part]:
    """whole: bytes of all gradients in the dtype of the weights.

    ZeRO-3 keeps one buffer. ZeRO-1 and ZeRO-2 keep a share until the step (stage_1_and_2.py,
    `grads_in_partition`), ZeRO-2 from the second micro-batch on a new one beside it. ZeRO-1 accumulates whole
    gradients before that, unless there is one micro-batch and overlap_comm reduces each as it is made.
    """
    stage = settings.stage
    accumulates = settings.accumulation > 1
    share = whole // settings.world_size
    if stage == 3:
        return [Part.at("gradients", share, settings.optimizer_at)]
    if stage and settings.optimizer_offloaded:
        return [Part.at("gradients", share if accumulates else 0, settings.optimizer_at)]
    kept = [Part("gradients", share if stage else whole, phases=("train", "update"))]
    if stage == 2 and accumulates:
        kept.append(Part("gradients of one micro-batch", share, phases=("train",)))
    if stage == 1 and settings.world_size > 1 and (accumulates or not settings.overlaps):
        kept.append(Part("whole gradients", whole, phases=("train",)))
    return kept


def temporary_buffers(
    model: nn.Module,
    settings: ZeroSettings,
    group_sizes: Sequence[int],
    uses: Sequence[Use] | None,
    matrices: Sequence[tuple[int, int]] = (),
) -> list[Part]:
    """What is there for a while: communication buckets, gathered weights, gradients under way, and the
    update's copies.

    group_sizes: elements of each parameter group of the optimizer. uses: the order of the modules
    (`training_pass`), from which ZeRO-3's gathered weights follow; None: their upper bound. matrices: as of
    `model_states`.
    """
    parts = _communication_buckets(model, settings)
    if settings.stage == 3:
        parts += _gathered_weights(model, settings, uses)
    parts += _update_copies(model, settings, group_sizes)
    parts += _whole_matrices(settings, matrices)
    return [part for part in parts if part.device or part.host]


def _communication_buckets(model: nn.Module, settings: ZeroSettings) -> list[Part]:
    bucket = settings.reduce_bucket * settings.bytes_per_weight
    contiguous = settings.zero.get("contiguous_gradients", True)
    if settings.stage == 3:
        sizes = trained_sizes(model)
        # the gradients of a bucket as autograd made them (a gradient larger than the bucket goes alone), and
        # the flat buffer that `reduce_scatter_coalesced` (runtime/comm/coalesced_collectives.py) copies them to
        reduced = max(max(sizes, default=0), min(settings.reduce_bucket, sum(sizes)))
        sent = Part("gradients being sent", 2 * settings.bytes_per_weight * reduced, phases=("train",))
        # kept from start to end (stage3.py, `bucket.buffer`)
        return [Part("communication buckets", bucket), sent] if contiguous else [sent]
    if settings.stage and contiguous:
        # stage_1_and_2.py, `setup_buckets`: taken at the first gradient, given back after the last; a second
        # one is filled while the first is sent
        count = 2 if settings.overlaps else 1
        return [Part("communication buckets", count * bucket, phases=("train",))]
    return []


def _update_copies(model: nn.Module, settings: ZeroSettings, group_sizes: Sequence[int]) -> list[Part]:
    width = settings.bytes_per_weight
    largest = max(trained_sizes(model), default=0)
    if settings.optimizer_offloaded:
        if settings.stage not in (1, 2):
            return []
        on_its_way = width * largest
        return [Part("gradient on its way to the host", on_its_way, host=on_its_way)]
    # one (sub-)group at a time is flattened and made the dtype of the master weights (stage3.py,
    # `_prepare_fp32_grad_for_sub_group`;
    # stage_1_and_2.py, `step`); norms of gradients are computed in fp64
    updated = max((settings.elements_updated_at_once(size) for size in group_sizes), default=0)
    converted = settings.bytes_per_master if settings.bytes_per_master != width else 0
    flattened = (width + converted) * updated
    if settings.optimizer_states != "fp32":
        flattened += UPDATED_CHUNK * min(CHUNK, updated)
    norm = 8 * largest // settings.weight_ranks
    return [Part("fp32 gradients of a group", max(flattened, norm), phases=("update",))]


def _whole_matrices(settings: ZeroSettings, matrices: Sequence[tuple[int, int]]) -> list[Part]:
    """What Muon puts together in an update (optimization/matrix_exchange.py): the parts that are sent, those that
    are received, and beside one matrix its iteration, which is in 16 bits. ZeRO-3 divides each matrix; ZeRO-1 and
    2 those alone that lie at the border of two ranks."""
    if not matrices:
        return []
    largest = max(rows * columns for rows, columns in matrices)
    divided = elements(matrices) if settings.stage == 3 else 2 * largest * settings.world_size
    exchanged = 2 * 4 * settings.elements_updated_at_once(divided) if settings.world_size > 1 else 0
    # fp32: the matrix, the result and the same scaled; 16 bits: two of its size and four of its smaller side
    iterated = (12 + 4 + 8) * largest
    return [Part("whole matrices (Muon)", exchanged + iterated, phases=("update",))]


def elements(matrices: Sequence[tuple[int, int]]) -> int:
    """Of all matrices together. matrices: their rows and columns."""
    return sum(rows * columns for rows, columns in matrices)


def pinned_rounding(model: nn.Module, settings: ZeroSettings, group_sizes: Sequence[int]) -> int:
    """Bytes of host memory that torch takes beyond what DeepSpeed asks for, where page-locked buffers of an
    offloaded optimizer are rounded up (`allocator.pinned_bytes`).

    ZeRO-3 (stage3.py) pins one buffer of all gradients and fp32 gradients by group; ZeRO-1 and 2
    (stage_1_and_2.py) fp32 master weights and gradients by group, and a buffer for the largest gradient.
    """
    pinned = settings.zero.get("offload_optimizer", {}).get("pin_memory", False)
    if not settings.stage or settings.optimizer_at != "cpu" or not pinned:
        return 0
    width = settings.bytes_per_weight
    groups = [4 * settings.elements_updated_at_once(size) for size in group_sizes]
    if settings.stage == 3:
        buffers = [width * (sum(group_sizes) // settings.world_size), *groups]
    else:
        buffers = [*groups, *groups, width * max(trained_sizes(model), default=0)]
    return sum(pinned_bytes(size) - size for size in buffers)


def _gathered_weights(model: nn.Module, settings: ZeroSettings, uses: Sequence[Use] | None) -> list[Part]:
    """One process has nothing to gather: it computes with its partition, or with a copy of what is offloaded.

    Weights that are gathered together are copied out of one buffer (`AllGatherCoalescedHandle.wait`), so the
    largest such gather counts twice.
    """
    if settings.computes_with_partitions:
        return []
    width = settings.bytes_per_weight
    gather_settings = GatherSettings.of(settings.zero)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    small = sum(sizes[name] for name in persistent(model, gather_settings))
    if uses is None:
        live = min(sum(sizes.values()), gather_settings.max_live_parameters + max(sizes.values()))
        copied = gather_settings.prefetch_bucket_size
    else:
        found = gathers(model, uses, gather_settings)
        live = found.most_live
        coalesced = [names for names in found.calls if len(names) > 1]
        copied = max((sum(sizes[name] for name in names) for names in coalesced), default=0)
    return [
        Part("small weights, whole", width * small),
        Part(GATHERED, width * (live + (0 if settings.world_size == 1 else copied)), phases=("train",)),
    ]
