"""Distributed evaluation with mmseg's own metrics.

In: a segmentor's forwards (see `distributed.gathering`) and a data set. Each rank segments every world-size-th image and counts pixels in a confusion
matrix; the matrices are added up at the end, so ranks with more images or more sliding windows keep nobody waiting, and memory does not grow with the data
set. Images that cannot be read are left out, counted and named.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import ConcatDataset

from internseg_ds.data.loading import EvaluationImage, evaluation_images
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.distributed.process_group import World, of_all_ranks
from internseg_ds.engine.segmenting import Segmenter
from internseg_ds.errors import DataError, FaultError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a data set, the same on every rank."""

    metrics: dict[str, float]
    """mmseg's names (mIoU, mAcc, aAcc, IoU.wall, ...) with values of 0 to 1, of the classes that occur."""
    confusion: Tensor
    """(classes + 1, classes + 1) int64: pixels by true class (the last row: a label that is no class, and not "ignore" either) and predicted class (the last
    column: an output of the model beyond the classes of the data set)."""
    images: int
    """How many were scored."""
    faults: list[str]
    """What was wrong with each image that was not."""

    @property
    def areas(self) -> Tensor:
        """(4, classes) float64: pixels in the intersection, the union, the prediction and the ground truth of each class, as mmseg's metrics take them."""
        return areas(self.confusion)


class Abandoned(Exception):
    """A request to stop came before the last image."""


class Watcher(Protocol):
    """Looks at each image that a rank has scored."""

    def see(self, index: int, labels: np.ndarray, score: float | None) -> None:
        """index: in the data set. labels: (h, w) int64. score: mean IoU over the classes of this image; None where nothing of it is labelled."""


def evaluate(
    forwards: Forwards,
    dataset: Any,
    *,
    world: World,
    workers: int,
    metrics: Sequence[str] = ("mIoU",),
    strict: bool = False,
    verbose: bool = True,
    watchers: Sequence[Watcher] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Scores a segmentor on `dataset` (an mmseg data set in test mode), split over the ranks. Collective at the end.

    strict: an image that cannot be read is an error. verbose: rank 0 logs mmseg's per-class table. stop: asked before each image.
    Raises Abandoned, on all ranks, when `stop` said so on one of them; DataError, on all ranks, when no image can be read or none is labelled; and
    FaultError, on the rank that finds it, when one cannot under `strict`.
    """
    classes, device = len(dataset.CLASSES), next(forwards.segmentor.parameters()).device
    confusion = torch.zeros(classes + 1, classes + 1, dtype=torch.int64, device=device)
    faults: list[str] = []
    images = images_of(dataset, world, workers, device, faults, strict=strict)
    scored, stopped = 0, False

    def until_stopped() -> Iterator[tuple[EvaluationImage, dict[str, Any]]]:
        nonlocal stopped
        for image in images:
            if stopped := stop():
                return
            yield image, image.inputs

    for segmented in Segmenter(forwards).segment(until_stopped()):
        image = segmented.key
        counted = count(segmented.labels, image.truth, classes, dataset.ignore_index)
        confusion += counted
        scored += 1
        if watchers:
            score, labels = image_score(counted), segmented.labels.cpu().numpy()
            for watcher in watchers:
                watcher.see(image.index, labels, score)
    if any(of_all_ranks(stopped)):
        raise Abandoned
    if dist.is_initialized():
        dist.all_reduce(confusion)
    confusion = confusion.cpu()
    scored, faults = conclude(scored, faults, world)
    if not confusion[:-1].any():
        raise DataError(
            f"no pixel of the {scored} images has the label of a class; are reduce_zero_label and the classes of the data set right?"
        )
    if world.is_main and (strangers := int(confusion[-1].sum())):
        log.warning(
            "%d labelled pixels are of no class (0 to %d) and not %d either; they count as wrong",
            strangers,
            classes - 1,
            dataset.ignore_index,
        )
    if world.is_main and (beyond := int(confusion[:, -1].sum())):
        log.warning(
            "%d pixels got an output of the model that is no class of the data set (%d and above); they count as wrong",
            beyond,
            classes,
        )
    return Evaluation(
        _scores(dataset, confusion, metrics, silent=not (verbose and world.is_main)),
        confusion,
        scored,
        faults,
    )


def evaluate_each(
    forwards: Forwards,
    dataset: Any,
    *,
    world: World,
    workers: int,
    metrics: Sequence[str] = ("mIoU",),
    strict: bool = False,
    verbose: bool = True,
    watchers: Callable[[int, Any], Sequence[Watcher]] = lambda _, __: (),
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """`evaluate` for one data set, or for each of several that are joined: their scores under mmseg's names for them (0_mIoU, 1_mIoU, ...), and without a
    number those of all pixels together.

    watchers(number, data set): of each.
    """
    common = dict(world=world, workers=workers, metrics=metrics, strict=strict, verbose=verbose, stop=stop)
    if not isinstance(dataset, ConcatDataset):
        return evaluate(forwards, dataset, watchers=watchers(0, dataset), **common)
    found = []
    for number, part in enumerate(dataset.datasets):
        if verbose and world.is_main:
            log.info(
                "data set %d of %d: %s",
                number,
                len(dataset.datasets),
                getattr(part, "img_dir", type(part).__name__),
            )
        found.append(evaluate(forwards, part, watchers=watchers(number, part), **common))
    confusion = sum(each.confusion for each in found)
    scores = _scores(dataset.datasets[0], confusion, metrics, silent=True)
    scores |= {
        f"{number}_{name}": value for number, each in enumerate(found) for name, value in each.metrics.items()
    }
    return Evaluation(
        scores,
        confusion,
        sum(each.images for each in found),
        [fault for each in found for fault in each.faults],
    )


def _scores(dataset: Any, confusion: Tensor, metrics: Sequence[str], *, silent: bool) -> dict[str, float]:
    """mmseg's metrics of a confusion matrix. A class that neither the ground truth nor the prediction holds has no score (NaN, which JSON does not know)."""
    scores = dataset.evaluate(
        [tuple(areas(confusion))], metric=list(metrics), logger="silent" if silent else None
    )
    return {
        name: round(float(value), 6)
        for name, value in scores.items()
        if "." not in name or not np.isnan(value)
    }


def images_of(
    dataset: Any,
    world: World,
    workers: int,
    device: torch.device,
    faults: list[str],
    *,
    strict: bool = False,
    truth: bool = True,
    doing: str = "evaluating",
) -> Iterator[EvaluationImage]:
    """This rank's images that can be read, with a progress bar; what is wrong with the others goes into `faults`, and is a FaultError under `strict`."""
    with Progress(
        TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not world.is_main
    ) as progress:
        task = progress.add_task("", total=len(range(world.rank, len(dataset), world.size)))
        for image in evaluation_images(
            dataset, rank=world.rank, world_size=world.size, workers=workers, device=device, truth=truth
        ):
            if image.fault is None:
                yield image
            elif strict:
                raise FaultError(f"{image.fault} (without --strict it would be left out)")
            else:
                faults.append(image.fault)
            progress.advance(task)


def conclude(done: int, faults: list[str], world: World) -> tuple[int, list[str]]:
    """How many images all ranks have done, and what is wrong with the others, after a warning of these. Collective.

    Raises DataError, on all ranks, when none is left.
    """
    told = of_all_ranks((done, faults))
    done, faults = sum(number for number, _ in told), sorted(fault for _, some in told for fault in some)
    if faults and not done:
        raise DataError(f"none of the {len(faults)} images can be read; the first: {faults[0]}")
    if faults and world.is_main:
        log.warning(
            "%d of %d images are left out, for they cannot be read:\n  %s",
            len(faults),
            len(faults) + done,
            "\n  ".join(faults),
        )
    return done, faults


def count(labels: Tensor, truth: Tensor, classes: int, ignore: int) -> Tensor:
    """The confusion matrix (classes + 1, classes + 1) int64 of one image; labels (h, w) int64, truth (h, w) of any whole type.
    See `Evaluation.confusion`."""
    kept = truth != ignore
    pairs = truth[kept].long().clamp(max=classes) * (classes + 1) + labels[kept].clamp(max=classes)
    return torch.bincount(pairs, minlength=(classes + 1) ** 2).view(classes + 1, classes + 1)


def areas(confusion: Tensor) -> Tensor:
    """Intersection, union, prediction and ground truth (4, classes) float64 of a confusion matrix; mmseg's `intersect_and_union`, summed."""
    intersection, prediction, truth = confusion.diagonal()[:-1], confusion.sum(0)[:-1], confusion.sum(1)[:-1]
    return torch.stack([intersection, prediction + truth - intersection, prediction, truth]).double()


def image_score(confusion: Tensor) -> float | None:
    """Mean IoU over the classes that occur in one image or its prediction; None where nothing is labelled."""
    intersection, union = areas(confusion)[:2]
    present = union > 0
    return (intersection[present] / union[present]).mean().item() if present.any() else None
