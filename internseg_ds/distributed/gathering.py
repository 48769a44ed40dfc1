"""Forwards for evaluation, of a model that ZeRO-3 may have partitioned.

Every forward of a partitioned model gathers its weights collectively, so ranks that run different numbers of forwards (sliding windows differ per image)
would wait for each other for ever. Two ways out: a plain copy, gathered once while ranks are in step, which then owes nothing to anybody; or, where there
is no room for it, forwards in step: ranks say before each whether they have work, and those that have none run along until nobody has.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from mmcv import ConfigDict
from torch import Tensor, nn

from internseg_ds.distributed.construction import build_on_meta, fill, gathered
from internseg_ds.distributed.device_memory import free_memory
from internseg_ds.distributed.precision import apply_precision

log = logging.getLogger(__name__)

EvaluationWeights = Literal["auto", "whole", "partitioned"]
"""How a partitioned model is evaluated: from a whole copy on each rank, in step, or from a copy where there is room for it."""
ROOM = 0.6
"""Share of the free memory that a whole copy may take; windows and logits need the rest."""


@dataclass(frozen=True)
class Forwards:
    """The forwards of `segmentor` (mmseg's, in eval mode). in_step: each is collective, and a rank that has no more calls `finish`."""

    segmentor: nn.Module
    in_step: bool = False

    def __call__(self, images: Tensor, metas: Sequence[Mapping[str, Any]]) -> Tensor:
        """images (b, 3, h, w) float32 -> logits (b, classes, h, w)."""
        if self.in_step:
            self._somebody_works(images.shape[2:])
        return self.segmentor.encode_decode(images, metas)

    def finish(self) -> None:
        """Runs along with the other ranks until all have finished."""
        device = next(self.segmentor.parameters()).device
        while self.in_step and (size := self._somebody_works(None)):
            self.segmentor.encode_decode(
                torch.zeros(1, 3, *size, device=device),
                [{"img_shape": (*size, 3), "pad_shape": (*size, 3), "ori_shape": (*size, 3)}],
            )

    def _somebody_works(self, size: torch.Size | None) -> tuple[int, int] | None:
        """The least height and width of the images that ranks are about to see, None when none is; size: (h, w) of this rank's, None for nothing."""
        device = next(self.segmentor.parameters()).device
        sizes = torch.tensor(size or (2**31, 2**31), dtype=torch.int64, device=device)
        dist.all_reduce(sizes, dist.ReduceOp.MIN)
        height, width = sizes.tolist()
        return (height, width) if height < 2**31 else None


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
    """The forwards of a trained segmentor, in eval mode, without gradients. Entering is collective; whether forwards are says `Forwards.in_step`.

    module: the trained segmentor, partitioned by ZeRO-3 or not. weights: see `EvaluationWeights`; says in the log what "auto" chose.
    """
    if (
        not is_partitioned(module)
        or weights == "whole"
        or (weights == "auto" and copy_fits(_whole_bytes(module), device))
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
    """A segmentor in eval mode whose forwards are this rank's own affair. Entering is collective under ZeRO-3; inside, nothing is.

    module: the trained segmentor. Under ZeRO-1/2 it is whole already and is lent; under ZeRO-3 a copy of `model` (the config's section) is filled,
    one parameter at a time, in the stored dtype (12 GB for 6 B in bf16), and freed at the end. Buffers are this rank's.
    """
    if is_partitioned(module):
        trained, buffers = dict(module.named_parameters()), dict(module.named_buffers())

        def whole(name: str, _: torch.Size) -> Tensor:
            with gathered([trained[name]]):
                return trained[name].data.to(device, copy=True)

        module = build_on_meta(model)
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


def is_partitioned(module: nn.Module) -> bool:
    return any(hasattr(param, "ds_id") for param in module.parameters())


def _whole_bytes(module: nn.Module) -> int:
    return sum(param.ds_numel * param.element_size() for param in module.parameters())


def copy_fits(needed: int, device: torch.device) -> bool:
    """Whether `needed` bytes of weights fit into the free memory of every rank, and windows and logits beside them. Collective; says so in the log."""
    spare = torch.tensor(
        free_memory(device, dist.get_world_size()) * ROOM - needed, dtype=torch.float64, device=device
    )
    dist.all_reduce(spare, dist.ReduceOp.MIN)
    fits = spare.item() >= 0
    log.info(
        "evaluation: %s, the weights take %.2f GiB whole and the rank with the least memory may use %.2f GiB for them",
        "each rank gathers a copy" if fits else "ranks gather weights layer by layer, in step",
        needed / 2**30,
        (spare.item() + needed) / 2**30,
    )
    return fits
