"""Forward passes for evaluation, of a model that ZeRO-3 may have partitioned.

Every forward pass of a partitioned model gathers its weights collectively, so ranks that run different
numbers of passes (the number of sliding windows differs per image) would wait for each other for ever. Two
ways out: each rank evaluates a whole copy, gathered once; or, where there is no memory for it, all ranks run
every pass together: before each they agree on whether any rank has work left, and a rank without work runs a
pass on zeros.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from mmcv import ConfigDict
from torch import Tensor, nn

from internseg_ds.distributed.construction import build_on_meta, fill
from internseg_ds.distributed.device_memory import free_memory, processes_here
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.precision import apply_precision
from internseg_ds.distributed.process_group import World
from internseg_ds.distributed.zero_internals import is_partitioned, undivided
from internseg_ds.models.backbone import image_channels
from internseg_ds.models.lora import add_same_adapters
from internseg_ds.zero_partition import full_shape

log = logging.getLogger(__name__)

EvaluationWeights = Literal["auto", "whole", "partitioned"]
"""How a partitioned model is evaluated: "whole": from a copy on each rank; "partitioned": all ranks together;
"auto": from a copy if every rank has the memory for it."""
WINDOWS_PER_FORWARD = 8
"""Windows per forward pass, unless `model.test_cfg.batch_size` sets it. One where ranks run together, which
they do for lack of memory."""
CHUNK_BYTES = 2**28
"""Bytes of logits at the original image's size that are held at a time."""
ROOM = 0.6
"""Fraction of the free memory that a whole copy may take; windows and logits need the rest."""
NO_WORK = 2**31
"""Height and width that a rank without images reports; above those of any image."""


@dataclass(frozen=True)
class Forwards:
    """The forward passes of `segmentor` (mmseg's, in eval mode).

    in_step: all ranks run every pass together: each call is collective, and a rank that has no more images
    calls `finish`.
    """

    segmentor: nn.Module
    in_step: bool = False

    def __call__(self, images: Tensor, metas: Sequence[Mapping[str, Any]]) -> Tensor:
        """images (b, 3, h, w) float32 -> logits (b, classes, h, w). metas: mmseg's img_metas of each
        image."""
        if self.in_step:
            self._smallest_image(images.shape[2:])
        return self._logits(images, metas)

    def finish(self) -> None:
        """Takes part in the other ranks' passes, with an image of zeros, until no rank has images left."""
        device = next(self.segmentor.parameters()).device
        channels = image_channels(self.segmentor)
        while self.in_step and (size := self._smallest_image(None)):
            shape = (*size, channels)
            meta = {"img_shape": shape, "pad_shape": shape, "ori_shape": shape}
            self._logits(torch.zeros(1, channels, *size, device=device), [meta])

    def _logits(self, images: Tensor, metas: Sequence[Mapping[str, Any]]) -> Tensor:
        segmentor: Any = self.segmentor
        return segmentor.encode_decode(images, metas)

    def _smallest_image(self, size: torch.Size | None) -> tuple[int, int] | None:
        """The least (height, width) of the images that the ranks are about to see; None if no rank has any.
        Collective.

        size: (height, width) of this rank's images, None if it has none.
        """
        device = next(self.segmentor.parameters()).device
        sizes = torch.tensor(size or (NO_WORK, NO_WORK), dtype=torch.int64, device=device)
        dist.all_reduce(sizes, dist.ReduceOp.MIN)
        height, width = sizes.tolist()
        return (height, width) if height < NO_WORK else None


@contextmanager
def forwards(
    module: nn.Module,
    model: ConfigDict,
    compute: torch.dtype,
    device: torch.device,
    *,
    heads: torch.dtype = torch.float32,
    autocast: bool = False,
    weights: EvaluationWeights = "auto",
) -> Iterator[Forwards]:
    """The forward passes of a trained segmentor, in eval mode, without gradients. Entering is collective;
    whether the passes are is `Forwards.in_step`.

    module: the trained segmentor, partitioned by ZeRO-3 or not. model: its section of the config. compute,
    heads, autocast: as of `apply_precision`. weights: see `EvaluationWeights`; the choice of "auto" is
    logged.
    """
    if runs_on_whole_weights(
        weights,
        device,
        partitionable=_has_partitions(module),
        whole_bytes=lambda: _bytes_of_copy(module, device),
    ):
        with whole_segmentor(module, model, compute, device, heads=heads, autocast=autocast) as whole:
            yield Forwards(whole)
    else:
        with _evaluating(module, device, autocast):
            yield Forwards(module, in_step=True)


@contextmanager
def whole_segmentor(
    module: nn.Module,
    model: ConfigDict,
    compute: torch.dtype,
    device: torch.device,
    *,
    heads: torch.dtype = torch.float32,
    autocast: bool = False,
) -> Iterator[nn.Module]:
    """A segmentor in eval mode whose forward passes involve no other rank. Entering is collective under
    ZeRO-3.

    module: the trained segmentor. Under ZeRO-1/2 it is whole and is used itself; under ZeRO-3 a copy is built
    from `model` (the config's section) and filled, one parameter at a time, in the parameters' dtype (12 GB
    for 6 B in bf16), and freed at the end; the only process needs no second copy, and its parameters are those of
    the engine in memory. Buffers are this rank's. compute, heads, autocast: as of `apply_precision`.
    """
    if _has_partitions(module):
        trained, buffers = dict(module.named_parameters()), dict(module.named_buffers())

        def whole(name: str, _: torch.Size) -> Tensor:
            if (own := undivided(trained[name], device)) is not None:
                return own
            with gathered([trained[name]]):
                return trained[name].data.to(device, copy=True)

        partitioned, module = module, build_on_meta(model)
        add_same_adapters(module.get_submodule("backbone"), partitioned.get_submodule("backbone"))
        fill(module, whole, lambda name, _: buffers[name].detach().clone())
        apply_precision(module, compute, heads=heads, autocast=autocast)
    with _evaluating(module, device, autocast):
        yield module


@contextmanager
def _evaluating(module: nn.Module, device: torch.device, autocast: bool) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        module.train(training)


def _has_partitions(module: nn.Module) -> bool:
    return any(is_partitioned(param) for param in module.parameters())


def _bytes_of_copy(module: nn.Module, device: torch.device) -> int:
    """What `whole_segmentor` takes beside a partitioned model."""
    return sum(
        full_shape(param).numel() * param.element_size()
        for param in module.parameters()
        if undivided(param, device) is None
    )


def runs_on_whole_weights(
    weights: EvaluationWeights,
    device: torch.device,
    *,
    partitionable: bool,
    whole_bytes: Callable[[], int],
) -> bool:
    """Decide whether each rank runs an evaluation on whole weights, or all ranks together on partitioned
    ones, layer by layer. Collective where `weights` is "auto" and `partitionable`.

    partitionable: whether there is anything to partition: a ZeRO-3 engine's parameters, or several ranks that
    load a file. whole_bytes(): the size of all weights on one rank, asked for under "auto" only.
    """
    if not partitionable or weights == "whole":
        return True
    return weights == "auto" and copy_fits(whole_bytes(), device)


def copy_fits(needed: int, device: torch.device) -> bool:
    """Whether `needed` bytes of weights fit into the free memory of every rank, with windows and logits
    beside them. Collective; logs the result."""
    processes = processes_here(World(rank=dist.get_rank(), size=dist.get_world_size()))
    spare = torch.tensor(free_memory(device, processes) * ROOM - needed, dtype=torch.float64, device=device)
    dist.all_reduce(spare, dist.ReduceOp.MIN)
    fits = spare.item() >= 0
    log.log(
        logging.DEBUG if fits else logging.INFO,  # that they fit is nothing to tell at each evaluation
        "evaluation: %s, the weights take %.2f GiB whole and the rank with the least memory may use %.2f "
        "GiB for them",
        "each rank gathers a copy" if fits else "ranks gather weights layer by layer, all ranks together",
        needed / 2**30,
        (spare.item() + needed) / 2**30,
    )
    return fits
