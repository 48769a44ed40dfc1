"""Distributed evaluation with mmseg's own metrics.

In: a whole segmentor (see `distributed.gathering`) and a data set. Each rank segments every world-size-th image and adds up areas per class; the only
collective is one all-reduce of those areas at the end, so ranks with more images or more sliding windows cannot dead-lock. Memory does not grow with
the data set.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from internseg_ds.data.loading import evaluation_batches
from internseg_ds.distributed.process_group import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """metrics: mmseg's names (mIoU, mAcc, aAcc, IoU.wall, ...) with values of 0 to 1, of the classes that occur. areas: float64 (4, classes), pixels in the intersection, the
    union, the prediction and the ground truth of each class over the whole data set."""

    metrics: dict[str, float]
    areas: Tensor


def evaluate(segmentor: nn.Module, dataset: Any, *, world: World, workers: int, metrics: Sequence[str] = ("mIoU",), verbose: bool = True,
             each: Callable[[int, np.ndarray], None] | None = None) -> Evaluation:
    """Scores `segmentor` on `dataset` (an mmseg data set in test mode), split over the ranks. Collective, once, at the end.

    each: called with (image index, labels (h, w) of the original image's size) for the images of this rank. verbose: rank 0 logs mmseg's per-class table.
    """
    areas = torch.zeros(4, len(dataset.CLASSES), dtype=torch.float64)
    device = next(segmentor.parameters()).device
    with Progress(TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not world.is_main) as progress:
        task = progress.add_task("", total=len(range(world.rank, len(dataset), world.size)))
        for index, inputs in evaluation_batches(dataset, rank=world.rank, world_size=world.size, workers=workers, device=device):
            labels = segment(segmentor, inputs)
            areas += torch.stack([part.double() for part in dataset.pre_eval(labels, [index])[0]])
            if each is not None:
                each(index, labels)
            progress.advance(task)
    if dist.is_initialized() and world.size > 1:
        shared = areas.to(world.device)
        dist.all_reduce(shared)
        areas = shared.cpu()
    scores = dataset.evaluate([tuple(areas)], metric=list(metrics), logger=None if verbose and world.is_main else "silent")
    # a class that neither the ground truth nor the prediction holds has no score (NaN, which JSON does not know)
    return Evaluation({name: float(value) for name, value in scores.items() if "." not in name or not np.isnan(value)}, areas)


def segment(segmentor: nn.Module, inputs: dict[str, Any]) -> np.ndarray:
    """Class labels (h, w) int64 of one image, at its original size; inputs as `evaluation_batches` yields them."""
    with torch.no_grad():
        return segmentor(return_loss=False, rescale=True, **inputs)[0]
