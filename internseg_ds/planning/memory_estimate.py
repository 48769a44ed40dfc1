"""The memory of one process through a run: what ZeRO keeps (`zero_memory`) and what passes make
(`activation_memory`) put together, phase by phase, and compared with what a device has.

In: a run on paper (`Run`) and what it runs on (`Platform`). Out: a `MemoryEstimate`. Assumptions have names,
and are lines of their own in its parts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from internseg_ds.config.ds_config import DsConfig
from internseg_ds.config.experiment import Experiment
from internseg_ds.distributed.device_memory import device_memory, processes_here
from internseg_ds.distributed.gathering import CHUNK_BYTES, ROOM
from internseg_ds.distributed.precision import backbone_dtype
from internseg_ds.distributed.process_group import World
from internseg_ds.planning.activation_memory import Activations
from internseg_ds.planning.devices import Cluster
from internseg_ds.planning.flops import Use
from internseg_ds.planning.zero_memory import (
    ALWAYS,
    GATHERED,
    MOMENT,
    Part,
    Phase,
    elements,
    model_states,
    pinned_rounding,
    temporary_buffers,
)
from internseg_ds.planning.zero_settings import ZeroSettings, saved_elements, total_elements, trained_elements

# assumed, not measured: CUDA's context, NCCL's buffers, workspaces of cuBLAS and cuDNN
CONTEXT = 2 * 2**30
"""Bytes per GPU that no tensor accounts for."""
# assumed, not measured: holes between blocks of torch's allocator, which grow with what is allocated and freed
FRAGMENTATION = 0.05
"""Share of what comes and goes (activations, gathered weights) that torch's allocator cannot use."""
# assumed, not measured: workspaces of convolutions and of cuBLAS beyond CONTEXT, holes that no tensor fits
# into, and NCCL's buffers on many links come to some GiB that nothing tells beforehand; a run that ends for lack
# of them has cost more than it saved
MARGIN = 0.06
"""Share of a GPU's memory that must stay free by the estimate."""
# assumed, not measured: the process itself, its data workers, images under way
HOST_PROCESS = 4 * 2**30
"""Bytes of host memory per process."""
TRAIN: tuple[Phase, ...] = ("train",)
EVALUATE: tuple[Phase, ...] = ("evaluate",)


@dataclass(frozen=True)
class Platform:
    """What a process runs on. device_bytes: memory of its device; per_host: processes of a host; host_bytes:
    memory of a host, None where it is not known. on_gpu: whether the device is a GPU, of which some memory
    should stay free. compute: the dtype that the backbone computes in there, None for that of GPUs."""

    device_bytes: float
    per_host: int = 1
    host_bytes: float | None = None
    on_gpu: bool = True
    compute: torch.dtype | None = None

    @classmethod
    def of_cluster(cls, cluster: Cluster) -> "Platform":
        return cls(cluster.device.memory_gib * 2**30, cluster.per_node, cluster.host_bytes)

    @classmethod
    def of_this_process(cls, experiment: Experiment, ds: DsConfig, world: World) -> "Platform":
        return cls(
            device_memory(world),
            processes_here(world),
            on_gpu=world.device.type == "cuda",
            compute=backbone_dtype(experiment.engine.backbone_dtype, world.device, ds.precision),
        )

    @property
    def margin(self) -> int:
        """Bytes of the device that should stay free."""
        return int(MARGIN * self.device_bytes) if self.on_gpu else 0

    @property
    def unit(self) -> str:
        return "GPU" if self.on_gpu else "process"

    def compute_dtype(self, experiment: Experiment, ds: DsConfig) -> torch.dtype:
        """The dtype that the backbone computes in."""
        if self.compute is not None:
            return self.compute
        if ds.precision == "fp32" or experiment.engine.backbone_dtype == "float32":
            return torch.float32
        return torch.bfloat16


@dataclass(frozen=True)
class EvaluationPass:
    """How images are evaluated. image: height and width at which logits are summed up. forward: the bytes of a
    forward pass of so many windows; batch: how many run at once; in_step: how many where ranks gather weights
    layer by layer, all together. weights: "auto", "whole", "partitioned" (`engine.evaluation_weights`)."""

    image: tuple[int, int]
    classes: int
    forward: Callable[[int], int]
    batch: int
    in_step: int
    weights: str

    @property
    def logits(self) -> int:
        """Bytes beside the forward: an image's logits in fp32, how many windows each pixel was in, and chunks
        of logits that are being resized (`evaluation.sliding_window`)."""
        whole = 4 * self.classes * math.prod(self.image)
        return whole + 4 * math.prod(self.image) + 3 * min(CHUNK_BYTES, whole)


@dataclass(frozen=True)
class Run:
    """A run on paper. model: on the meta device, for shapes. group_sizes: elements of each parameter group of
    the optimizer. activations: of a training micro-batch. uses: see `zero_memory.temporary_buffers`.
    evaluation: None where the run does not evaluate. ema, background_save: whether the run has them. matrices:
    rows and columns of those that Muon trains."""

    model: nn.Module
    settings: ZeroSettings
    group_sizes: Sequence[int]
    activations: Activations
    uses: Sequence[Use] | None = None
    evaluation: EvaluationPass | None = None
    ema: bool = False
    background_save: bool = False
    matrices: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process. states: weights, gradients, optimizer. others: all other parts. checkpoint,
    consolidated: bytes on disk of one save by all processes, and of its consolidated fp32 file."""

    states: tuple[Part, ...]
    others: tuple[Part, ...]
    checkpoint: int
    consolidated: int
    platform: Platform

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.states + self.others

    def device(self, phase: Phase) -> int:
        return _device(self.parts, phase)

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
        return self.peak + self.platform.margin

    @property
    def host(self) -> int:
        """Bytes of host memory of one process."""
        return sum(part.host for part in self.parts)

    @property
    def whole_host(self) -> int:
        """Bytes of host memory of all processes of a host."""
        return self.host * self.platform.per_host

    @property
    def state_on_device(self) -> int:
        return sum(part.device for part in self.states)

    @property
    def state_on_host(self) -> int:
        return sum(part.host for part in self.states)

    @property
    def fits_device(self) -> bool:
        return self.needed <= self.platform.device_bytes

    @property
    def fits_host(self) -> bool:
        return self.platform.host_bytes is None or self.whole_host <= self.platform.host_bytes

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host


def estimate_memory(run: Run, platform: Platform) -> MemoryEstimate:
    """platform: decides whether an evaluation copies the weights whole, and how many windows it runs at
    once."""
    states = model_states(run.model, run.settings, run.matrices)
    others = [
        *_moving_average(run),
        *temporary_buffers(run.model, run.settings, run.group_sizes, run.uses, run.matrices),
        *_page_locked(run),
        *_activation_parts(run.activations),
        *_background_save(run),
    ]
    if run.evaluation is not None:
        copied = 0 if run.settings.computes_with_partitions else total_elements(run.model)
        weights = run.settings.bytes_per_weight * copied
        room = platform.device_bytes - platform.margin
        others += _evaluation_parts([*states, *others], run.evaluation, run.settings.stage, weights, room)
    others += _fragmentation([*states, *others])
    others.append(Part("process and context", CONTEXT, HOST_PROCESS))
    buffers = _buffer_bytes(run.model)
    return MemoryEstimate(
        tuple(states),
        tuple(others),
        checkpoint=checkpoint_bytes(run.model, run.settings, ema=run.ema, matrices=run.matrices),
        consolidated=4 * total_elements(run.model) + buffers,
        platform=platform,
    )


def checkpoint_bytes(
    model: nn.Module, settings: ZeroSettings, *, ema: bool, matrices: Sequence[tuple[int, int]] = ()
) -> int:
    """On disk, of one save by all processes: master weights and moments, their average, buffers, and the weights that
    modules compute with (`saved_elements`). matrices: those of Muon."""
    weights = settings.bytes_per_weight * saved_elements(model, settings.stage)
    return _saved_state(model, settings, matrices, ema) + weights + _buffer_bytes(model)


def _saved_state(
    model: nn.Module, settings: ZeroSettings, matrices: Sequence[tuple[int, int]], ema: bool
) -> int:
    """Bytes of the optimizer's state of all processes in a checkpoint; ema: with the fp32 moving average."""
    per_parameter = settings.bytes_per_master + settings.bytes_of_moments + (4 if ema else 0)
    return int(per_parameter * trained_elements(model)) - MOMENT * elements(matrices)


def _buffer_bytes(model: nn.Module) -> int:
    """Buffers stay in fp32 (`distributed.precision.buffers_to_fp32`)."""
    return sum(4 * buffer.numel() for buffer in model.buffers())


def _device(parts: Sequence[Part], phase: Phase, *, lasting: bool = True) -> int:
    """Bytes of the device in one phase; lasting: with parts that are there always."""
    return sum(part.device for part in parts if phase in part.phases and (lasting or part.phases != ALWAYS))


def _moving_average(run: Run) -> list[Part]:
    if not run.ema:
        return []
    size = 4 * (trained_elements(run.model) // run.settings.optimizer_ranks)
    # it follows the optimizer, but to no disk
    place = "cpu" if run.settings.optimizer_at == "nvme" else run.settings.optimizer_at
    parts = [Part.at("moving average", size, place)]
    if run.settings.bf16_master:
        parts.append(Part("weights beside the average", size // 2, phases=EVALUATE))
    return parts


def _page_locked(run: Run) -> list[Part]:
    rounding = pinned_rounding(run.model, run.settings, run.group_sizes)
    return [Part("page-locked buffers rounded up", host=rounding)] if rounding else []


def _background_save(run: Run) -> list[Part]:
    if not run.background_save:
        return []
    # each process copies its share of the optimizer, and the weights beside it or its share of them
    share = _saved_state(run.model, run.settings, run.matrices, run.ema) // run.settings.optimizer_ranks
    weights = run.settings.bytes_per_weight * saved_elements(run.model, run.settings.stage)
    return [Part("save in the background", host=share + weights // run.settings.weight_ranks)]


def _activation_parts(activations: Activations) -> list[Part]:
    kept = activations.batch + activations.kept
    return [
        Part("kept for the backward pass", kept, phases=TRAIN),
        Part("one block, or heads and losses", max(0, activations.peak - kept), phases=TRAIN),
    ]


def _evaluation_parts(
    parts: Sequence[Part], evaluation: EvaluationPass, stage: int, weights: int, room: float
) -> list[Part]:
    """weights: bytes that a copy of all weights takes, which ZeRO-3 gathers where it fits; else it gathers layer by
    layer (`distributed.gathering`). room: bytes of the device that may be used.

    Windows that do not fit are run in halves of a batch (`evaluation.sliding_window`), but where ranks gather
    weights layer by layer, all together.
    """
    used = CONTEXT + _device(parts, "evaluate")
    windows = evaluation.batch
    gathered: list[Part] = []
    if stage == 3:
        fits = weights <= ROOM * (room - used)
        if evaluation.weights == "whole" or (evaluation.weights == "auto" and fits):
            gathered = [Part("evaluation: a whole copy of the weights", weights, phases=EVALUATE)]
        else:
            windows = evaluation.in_step
            live = next((part.device for part in parts if part.name == GATHERED), 0)
            gathered = [Part("evaluation: gathered weights", live, phases=EVALUATE)]
    beside = _device(gathered, "evaluate") + evaluation.logits
    comes_and_goes = _device(parts, "evaluate", lasting=False) + beside

    def needed(windows: int) -> float:
        forward = evaluation.forward(windows)
        return used + beside + forward + FRAGMENTATION * (comes_and_goes + forward)

    while windows > evaluation.in_step and needed(windows) > room:
        windows //= 2
    name = f"evaluation: {windows} windows" if windows > 1 else "evaluation: 1 window"
    return [
        *gathered,
        Part(name, evaluation.forward(windows), phases=EVALUATE),
        Part("evaluation: logits of an image", evaluation.logits, phases=EVALUATE),
    ]


def _fragmentation(parts: Sequence[Part]) -> list[Part]:
    return [
        Part("fragmentation", int(FRAGMENTATION * _device(parts, phase, lasting=False)), phases=(phase,))
        for phase in ALWAYS
    ]
