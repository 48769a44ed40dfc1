"""Bytes per process of what ZeRO keeps and passes through in training: weights, gradients, optimizer, buckets, gathered weights, and their peers on the host.

Sources: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), table 1: with Adam, bf16 training keeps
2 + 2 + 12 bytes per parameter, of which stage 1 divides the optimizer's 12 by the number of processes, stage 2 the gradients too, stage 3 all. hpZ keeps a
second copy of the weights, divided over a node (Wang et al., "ZeRO++", 2023). Where DeepSpeed 0.19.8 keeps more or less, its code is named below;
`tests/planning/test_memory_counted.py` holds the sums against what a real engine keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from internseg_ds.allocator import pinned_bytes
from internseg_ds.planning.gathers import GatherSettings, gathered, persistent
from internseg_ds.planning.training_pass import Use

Phase = Literal["train", "update", "evaluate"]
"""Forward and backward passes of the last micro-batch; the optimizer's step; an evaluation."""
ALWAYS: tuple[Phase, ...] = ("train", "update", "evaluate")


@dataclass(frozen=True)
class Part:
    """One line of a table of memory. device, host, nvme: bytes of one process. phases: when it is there."""

    name: str
    device: int = 0
    host: int = 0
    nvme: int = 0
    phases: tuple[Phase, ...] = ALWAYS

    @classmethod
    def at(cls, name: str, size: int, place: str, phases: tuple[Phase, ...] = ALWAYS) -> "Part":
        """place: "none" (the device), "cpu" or "nvme", as ds_configs call it."""
        return cls(name, **{{"none": "device", "cpu": "host", "nvme": "nvme"}[place]: size}, phases=phases)


def state(
    model: nn.Module, ds_raw: Mapping[str, Any], precision: str, world_size: int, accumulation: int = 1
) -> list[Part]:
    """Weights, gradients and optimizer of a model with Adam, and hpZ's copy of the weights. ds_raw: a ds_config without "auto" values.

    precision: "bf16" (fp32 masters and two moments: 12 bytes) or fp32 parameters ("autocast", "fp32"): they are their own masters under ZeRO-0, and have a
    partitioned copy beside them under ZeRO-1 to 3. (stage3.py means to save that copy, but compares a device with its name, which are never equal.) Frozen
    parameters have weights only. accumulation: micro-batches per step.
    """
    zero = ds_raw.get("zero_optimization", {})
    stage, n = zero.get("stage", 0), world_size
    total = sum(param.numel() for param in model.parameters())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    width = 2 if precision == "bf16" else 4
    weights_at, optimizer_at = (
        zero.get(f"offload_{part}", {}).get("device", "none") for part in ("param", "optimizer")
    )
    parts = [
        Part.at("weights", width * total // (n if stage == 3 else 1), weights_at),
        *_gradients(width * trained, zero, n, accumulation),
        Part.at(
            "optimizer",
            (8 if width == 4 and not stage else 12) * trained // (n if stage else 1),
            optimizer_at,
        ),
    ]
    if (
        optimizer_at != "none" and stage
    ):  # stage3.py, `initialize_optimizer_states`; stage_1_and_2.py, where a bf16 copy of new weights is kept too
        parts.append(
            Part.at("gradients in fp32", (4 if stage == 3 else 4 + width) * trained // n, optimizer_at)
        )
    if stage == 3 and (node := zero.get("zero_hpz_partition_size", 1)) > 1:
        parts.append(Part.at("second copy (hpZ)", width * total // node, weights_at))
    return parts


def _gradients(whole: int, zero: Mapping[str, Any], n: int, accumulation: int) -> list[Part]:
    """whole: bytes of all gradients in the dtype of the weights.

    ZeRO-3 keeps one buffer. ZeRO-1 and ZeRO-2 keep a share until the step (stage_1_and_2.py, `grads_in_partition`), ZeRO-2 from the second micro-batch on a
    new one beside it. ZeRO-1 piles whole gradients up before, unless there is one micro-batch and overlap_comm reduces them as they are made.
    """
    stage, offloaded, share = (
        zero.get("stage", 0),
        zero.get("offload_optimizer", {}).get("device", "none"),
        whole // n,
    )
    if stage == 3:
        return [Part.at("gradients", share, offloaded)]
    if stage and offloaded != "none":
        return [Part.at("gradients", share if accumulation > 1 else 0, offloaded)]
    kept = [Part("gradients", share if stage else whole, phases=("train", "update"))]
    if stage == 2 and accumulation > 1:
        kept.append(Part("gradients of one micro-batch", share, phases=("train",)))
    if stage == 1 and n > 1 and (accumulation > 1 or not zero.get("overlap_comm", False)):
        kept.append(Part("whole gradients", whole, phases=("train",)))
    return kept


def passing(
    model: nn.Module,
    ds_raw: Mapping[str, Any],
    precision: str,
    world_size: int,
    uses: Sequence[Use] | None,
    group_sizes: Sequence[int],
) -> list[Part]:
    """What is there for a while: communication buckets, gathered weights, gradients under way, and the update's copies.

    uses: the order of the modules (`training_pass`), from which ZeRO-3's gathered weights follow; None: their upper bound. group_sizes: elements of each
    parameter group of the optimizer.
    """
    zero = ds_raw.get("zero_optimization", {})
    stage, n, width = zero.get("stage", 0), world_size, 2 if precision == "bf16" else 4
    trained = [param.numel() for param in model.parameters() if param.requires_grad]
    bucket, largest = int(float(zero.get("reduce_bucket_size", 500_000_000))), max(trained, default=0)
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    parts = []
    contiguous = zero.get("contiguous_gradients", True)
    if stage == 3:
        if contiguous:  # kept from start to end (stage3.py, `bucket.buffer`)
            parts.append(Part("communication buckets", bucket * width))
        parts.append(
            Part(
                "gradients being sent", 2 * width * max(largest, min(bucket, sum(trained))), phases=("train",)
            )
        )
        parts += _gathered(model, zero, width, n, uses)
    elif (
        stage and contiguous
    ):  # stage_1_and_2.py, `setup_buckets`: taken at the first gradient, given back after the last
        count = 2 if zero.get("overlap_comm", False) else 1
        parts.append(Part("communication buckets", bucket * width * count, phases=("train",)))
    if not offloaded:
        # one (sub-)group at a time is flattened and made fp32 (`_prepare_fp32_grad_for_sub_group`; ZeRO-1, 2: `step`); norms are taken in fp64
        share = max((_flattened(size, zero, n) for size in group_sizes), default=0)
        parts.append(
            Part(
                "fp32 gradients of a group",
                max((width + (4 if width == 2 else 0)) * share, 8 * largest // (n if stage == 3 else 1)),
                phases=("update",),
            )
        )
    elif stage and stage < 3:
        parts.append(Part("gradient on its way to the host", width * largest, host=width * largest))
    return [part for part in parts if part.device or part.host]


def pinned_rounding(
    zero: Mapping[str, Any], width: int, n: int, group_sizes: Sequence[int], largest: int
) -> int:
    """Bytes of host memory that torch takes beyond what DeepSpeed asks for, where page-locked buffers of an offloaded optimizer are rounded up
    (`allocator.pinned_bytes`).

    width: bytes per gradient. largest: elements of the largest trained parameter. ZeRO-3 (stage3.py) pins one buffer of all gradients and fp32 gradients
    by group; ZeRO-1 and 2 (stage_1_and_2.py) fp32 masters and gradients by group, and a buffer for the largest gradient.
    """
    offload, stage = zero.get("offload_optimizer", {}), zero.get("stage", 0)
    if not stage or offload.get("device", "none") != "cpu" or not offload.get("pin_memory", False):
        return 0
    shares = [_flattened(size, zero, n) for size in group_sizes]
    if stage == 3:
        buffers = [width * (sum(group_sizes) // n), *(4 * share for share in shares)]
    else:
        buffers = [*(4 * share for share in shares for _ in ("master", "gradient")), width * largest]
    return sum(pinned_bytes(size) - size for size in buffers)


def _flattened(size: int, zero: Mapping[str, Any], n: int) -> int:
    """Elements of a parameter group that one process updates at once."""
    share = size // (n if zero.get("stage", 0) else 1)
    return (
        min(share, int(float(zero.get("sub_group_size", 1e9)))) if zero.get("stage") == 3 else share
    )  # and up to a parameter more


def _gathered(
    model: nn.Module, zero: Mapping[str, Any], width: int, n: int, uses: Sequence[Use] | None
) -> list[Part]:
    """One process has nothing to gather: it computes with its partition (partition_parameters.py, `NoGatherHandle`), or with a copy of what is offloaded.

    Weights that are gathered together are copied out of one buffer (`AllGatherCoalescedHandle.wait`), so the largest such gather counts twice.
    """
    settings = GatherSettings.of(zero)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    small = sum(sizes[name] for name in persistent(model, settings))
    if n == 1 and zero.get("offload_param", {}).get("device", "none") == "none":
        return []
    if uses is None:
        live, twice = (
            min(sum(sizes.values()), settings.max_live_parameters + max(sizes.values())),
            settings.prefetch_bucket_size,
        )
    else:
        found = gathered(model, uses, settings)
        live, twice = (
            found.live,
            max((sum(sizes[name] for name in params) for params in found.made if len(params) > 1), default=0),
        )
    return [
        Part("small weights, whole", width * small),
        Part("gathered weights", width * (live + (twice if n > 1 else 0)), phases=("train",)),
    ]
