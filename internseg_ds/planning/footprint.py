"""The memory of one process through a run: `memory`'s and `activations`' parts put together, phase by phase, and held against what a device has.

In: a segmentor on the meta device, a ds_config, and what was found of its activations. Out: a `Footprint`. Assumptions have names and stand in its parts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from internseg_ds.planning.activations import Activations
from internseg_ds.planning.memory import ALWAYS, Part, Phase, passing, pinned_rounding, state
from internseg_ds.planning.training_pass import Use

CONTEXT = 2 * 2**30
"""Assumed, bytes per GPU: CUDA's context, NCCL's buffers, workspaces of cuBLAS and cuDNN."""
FRAGMENTATION = 0.05
"""Assumed: what torch's allocator cannot use, as a share of what comes and goes (activations, gathered weights)."""
MARGIN = 0.06
"""Assumed: share of a GPU's memory that must stay free by the plan. Workspaces of convolutions and of cuBLAS beyond `CONTEXT`, holes that no tensor fits
into, and NCCL's buffers on many links come to some GiB that nobody can tell beforehand; a run that ends for lack of them has cost more than it saved."""
HOST_PROCESS = 4 * 2**30
"""Assumed, bytes of host memory per process: the process itself, its data workers, images under way."""


@dataclass(frozen=True)
class Evaluation:
    """How images are evaluated. image: height and width at which logits are added up. forward: the bytes of a forward pass of so many windows; batch,
    in_step: how many run at once, and how many where ranks run in step. weights: "auto", "whole", "partitioned" (`engine.evaluation_weights`); room:
    the share of the free memory that "auto" may give to a whole copy of them; chunk: bytes of logits that are resized at a time."""

    image: tuple[int, int]
    classes: int
    forward: Callable[[int], int]
    batch: int
    in_step: int
    weights: str
    room: float
    chunk: int

    @property
    def logits(self) -> int:
        """Bytes beside the forward: an image's logits in fp32, and chunks of them being resized."""
        whole = 4 * self.classes * math.prod(self.image)
        return whole + 4 * math.prod(self.image) + 3 * min(self.chunk, whole)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process. parts: of all phases. checkpoint, consolidated: bytes on disk of one save by all processes, and of its consolidated fp32 file.
    margin: of the device, that should stay free."""

    parts: tuple[Part, ...]
    checkpoint: int
    consolidated: int
    margin: int = 0

    def device(self, phase: Phase) -> int:
        return sum(part.device for part in self.parts if phase in part.phases)

    @property
    def fullest(self) -> Phase:
        """The phase that needs most of the device."""
        return max(ALWAYS, key=self.device)

    @property
    def peak(self) -> int:
        return self.device(self.fullest)

    @property
    def needed(self) -> int:
        """What the device must have: the peak, and what should stay free."""
        return self.peak + self.margin

    @property
    def host(self) -> int:
        return sum(part.host for part in self.parts)

    @property
    def nvme(self) -> int:
        return sum(part.nvme for part in self.parts)


def footprint(
    model: nn.Module,
    ds_raw: Mapping[str, Any],
    precision: Literal["bf16", "autocast", "fp32"],
    *,
    world_size: int,
    accumulation: int,
    group_sizes: Sequence[int],
    uses: Sequence[Use] | None,
    activations: Activations,
    evaluation: Evaluation | None,
    ema: bool,
    background_save: bool,
    device_bytes: float,
    on_gpu: bool = True,
) -> Footprint:
    """model: on the meta device, for shapes. ds_raw: without "auto" values. group_sizes: elements of each parameter group. uses: see `memory.passing`.

    evaluation: None where the run does not evaluate. ema, background_save: whether the run has them. device_bytes: memory of the device, which decides
    whether an evaluation copies the weights whole. on_gpu: whether the device is a GPU, of which some should stay free.
    """
    margin = int(MARGIN * device_bytes) if on_gpu else 0
    zero = ds_raw.get("zero_optimization", {})
    stage, n, width = zero.get("stage", 0), world_size, 2 if precision == "bf16" else 4
    total = sum(param.numel() for param in model.parameters())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    buffers = sum(4 * buffer.numel() for buffer in model.buffers())
    optimizer_at = zero.get("offload_optimizer", {}).get("device", "none")
    parts = state(model, ds_raw, precision, n, accumulation)
    shard = trained // (n if stage else 1)
    if ema:
        parts.append(Part.at("moving average", 4 * shard, "cpu" if optimizer_at == "nvme" else optimizer_at))
    parts += passing(model, ds_raw, precision, n, uses, group_sizes)
    if pinned := pinned_rounding(
        zero,
        width,
        n,
        group_sizes,
        max((param.numel() for param in model.parameters() if param.requires_grad), default=0),
    ):
        parts.append(Part("page-locked buffers rounded up", host=pinned))
    train: tuple[Phase, ...] = ("train",)
    parts += [
        Part("kept for the backward pass", activations.batch + activations.kept, phases=train),
        Part(
            "one block, or heads and losses",
            max(0, activations.peak - activations.batch - activations.kept),
            phases=train,
        ),
    ]
    files = checkpoint_bytes(model, stage, width, ema=ema)
    if background_save:
        parts.append(
            Part(
                "save in the background",
                host=(16 if ema else 12) * shard + (width * total if stage < 3 else 0),
            )
        )
    if evaluation is not None:
        parts += _evaluation(parts, evaluation, stage, width * total, device_bytes - margin)
    comes = {
        phase: sum(part.device for part in parts if phase in part.phases and part.phases != ALWAYS)
        for phase in ALWAYS
    }
    parts += [
        Part("fragmentation", int(FRAGMENTATION * size), phases=(phase,)) for phase, size in comes.items()
    ]
    parts.append(Part("process and context", CONTEXT, HOST_PROCESS))
    return Footprint(tuple(parts), files, 4 * total + buffers, margin)


def checkpoint_bytes(model: nn.Module, stage: int, width: int, *, ema: bool) -> int:
    """On disk, of one save by all processes: fp32 masters and moments, their average, buffers, and under ZeRO-1 and 2 the weights, of `width` bytes each."""
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    weights = width * sum(param.numel() for param in model.parameters()) if stage < 3 else 0
    return (16 if ema else 12) * trained + weights + sum(4 * buffer.numel() for buffer in model.buffers())


def _evaluation(
    parts: Sequence[Part], evaluation: Evaluation, stage: int, whole: int, device_bytes: float
) -> list[Part]:
    """whole: bytes of all weights, which ZeRO-3 gathers into a copy where they fit, or layer by layer (`distributed.gathering`).

    Windows that do not fit are run in halves of a batch (`engine.segmenting`), but where ranks run in step.
    """
    phase: tuple[Phase, ...] = ("evaluate",)
    used, windows, weights = (
        CONTEXT + sum(part.device for part in parts if "evaluate" in part.phases),
        evaluation.batch,
        [],
    )
    if stage == 3:
        if evaluation.weights == "whole" or (
            evaluation.weights == "auto" and whole <= evaluation.room * (device_bytes - used)
        ):
            weights = [Part("evaluation: a whole copy of the weights", whole, phases=phase)]
        else:
            windows = evaluation.in_step
            gathered = next((part.device for part in parts if part.name == "gathered weights"), 0)
            weights = [Part("evaluation: gathered weights", gathered, phases=phase)]
    beside = sum(part.device for part in weights) + evaluation.logits
    comes = sum(part.device for part in parts if "evaluate" in part.phases and part.phases != ALWAYS)
    while windows > evaluation.in_step and (
        used
        + beside
        + evaluation.forward(windows)
        + FRAGMENTATION * (comes + beside + evaluation.forward(windows))
        > device_bytes
    ):
        windows //= 2
    return [
        *weights,
        Part(f"evaluation: {windows} window{'s' * (windows > 1)}", evaluation.forward(windows), phases=phase),
        Part("evaluation: logits of an image", evaluation.logits, phases=phase),
    ]
