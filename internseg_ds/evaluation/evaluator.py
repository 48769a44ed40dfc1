"""Distributed evaluation with mmseg's own metrics.

In: a segmentor's forwards (see `distributed.gathering`) and a data set. Each rank segments every
world-size-th image and counts pixels in a confusion matrix; the matrices are added up at the end, so ranks
with more images or more sliding windows keep nobody waiting, and memory does not grow with the data set.
Images that cannot be read are left out, counted and named.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import ConcatDataset

from internseg_ds.data.loading import EvaluationImage, evaluation_images
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.distributed.process_group import World, gather_from_ranks
from internseg_ds.errors import DataError, FaultError, are, counted, shortened
from internseg_ds.evaluation.class_table import absent_classes, class_scores, is_of_one_class, table
from internseg_ds.evaluation.sliding_window import SlidingWindowInference
from internseg_ds.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a data set, the same on every rank."""

    metrics: dict[str, float]
    """mmseg's names (mIoU, mAcc, aAcc, IoU.wall, ...) with values of 0 to 1, of the classes that occur."""
    confusion: Tensor
    """(classes + 1, classes + 1) int64: number of pixels by true class (the last row: a label that is no
    class, and not "ignore" either) and predicted class (the last column: an output of the model beyond the
    classes of the data set)."""
    images: int
    """Number of images that were scored."""
    faults: list[str]
    """What was wrong with each image that was not."""

    @property
    def areas(self) -> Tensor:
        """(4, classes) float64: number of pixels in the intersection, the union, the prediction and the
        ground truth of each class, as mmseg's metrics take them."""
        return areas(self.confusion)


class Abandoned(Exception):
    """A request to stop came before the last image."""


class ImageObserver(Protocol):
    """Is called with each image that a rank has scored."""

    def observe(self, index: int, labels: np.ndarray, score: float | None) -> None:
        """index: of the image in the data set. labels: (h, w) int64, the prediction. score: mean IoU over
        the classes of this image; None where none of its pixels is labelled."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How a data set is evaluated."""

    world: World
    workers: int
    """Processes that load images, of each rank."""
    metrics: Sequence[str] = ("mIoU",)
    """mmseg's names of metrics."""
    strict: bool = False
    """An image that cannot be read is an error."""
    verbose: bool = True
    """Rank 0 logs a table of scores by class."""
    stop: Callable[[], bool] = lambda: False
    """Asked before each image whether to end the evaluation."""


def evaluate_dataset(
    forwards: Forwards, dataset: Any, options: EvaluationOptions, observers: Sequence[ImageObserver] = ()
) -> Evaluation:
    """Score a segmentor on `dataset` (an mmseg data set in test mode), split over the ranks. Collective at
    the end.

    Raises Abandoned, on all ranks, when `options.stop` returned true on one of them; DataError, on all ranks,
    when no image can be read or none is labelled; and FaultError, on the rank that finds it, when one cannot
    be read under `options.strict`. observers: are called with each image that this rank has scored.
    """
    device = next(forwards.segmentor.parameters()).device
    images = ReadableImages(dataset, options.world, options.workers, device, strict=options.strict)
    confusion, own_count, stopped = _score_images(forwards, dataset, images, options.stop, observers)
    if any(gather_from_ranks(stopped)):
        raise Abandoned
    if dist.is_initialized():
        dist.all_reduce(confusion)
    confusion = confusion.cpu()
    image_count, faults = images.totals(own_count)
    pixels_of_a_class = confusion[:-1]  # the last row: labels of no class
    if not pixels_of_a_class.any():
        raise DataError(
            f"no pixel of the {counted(image_count, 'image')} has the label of a class; are "
            "reduce_zero_label and the classes of the data set right?"
        )
    if options.world.is_main:
        _warn_of_unknown_classes(confusion, dataset.ignore_index)
    scores = _scores(dataset, confusion, options.metrics)
    if options.verbose and options.world.is_main:
        log.info("of each class:\n%s", table(class_scores(scores, confusion, dataset.CLASSES)))
        _tell_absent_classes(confusion, dataset.CLASSES)
    return Evaluation(scores, confusion, image_count, faults)


def _score_images(
    forwards: Forwards,
    dataset: Any,
    images: "ReadableImages",
    stop: Callable[[], bool],
    observers: Sequence[ImageObserver],
) -> tuple[Tensor, int, bool]:
    """Segment this rank's images until `stop` returns true. Returns the confusion matrix as of
    `Evaluation.confusion`, on the device, the number of images that were scored, and whether it was stopped."""
    classes = len(dataset.CLASSES)
    confusion = torch.zeros(classes + 1, classes + 1, dtype=torch.int64, device=images.device)
    image_count = 0
    stopped = False

    def so_far() -> str:
        intersection, union = areas(confusion)[:2]
        there = union > 0
        if not there.any():
            return ""
        return f"mIoU of rank 0 so far {100 * (intersection[there] / union[there]).mean().item():.2f} %"

    images.note = so_far

    def until_stopped() -> Iterator[tuple[EvaluationImage, dict[str, Any]]]:
        nonlocal stopped
        for image in images:
            stopped = stop()
            if stopped:
                return
            yield image, image.inputs

    for prediction in SlidingWindowInference(forwards).predict(until_stopped()):
        image: EvaluationImage = prediction.key
        if image.truth is None:
            raise ValueError("an evaluation needs images with their ground truth")
        of_image = confusion_matrix(prediction.labels, image.truth, classes, dataset.ignore_index)
        confusion += of_image
        image_count += 1
        if observers:
            score = image_score(of_image)
            labels = prediction.labels.cpu().numpy()
            for observer in observers:
                observer.observe(image.index, labels, score)
    return confusion, image_count, stopped


def _warn_of_unknown_classes(confusion: Tensor, ignore_index: int) -> None:
    """confusion: as of `Evaluation.confusion`."""
    classes = len(confusion) - 1
    unknown_labels = int(confusion[-1].sum())
    if unknown_labels:
        log.warning(
            "%s of no class (0 to %d) and not %d either, which counts as wrong",
            counted(unknown_labels, "labelled pixel is", "labelled pixels are"),
            classes - 1,
            ignore_index,
        )
    unknown_predictions = int(confusion[:, -1].sum())
    if unknown_predictions:
        log.warning(
            "%s an output of the model that is no class of the data set (%d and above), which counts as "
            "wrong",
            counted(unknown_predictions, "pixel got", "pixels got"),
            classes,
        )


def _tell_absent_classes(confusion: Tensor, classes: Sequence[str]) -> None:
    """The classes that the table leaves out, in one line."""
    absent = absent_classes(confusion)
    predicted = [index for index in absent if confusion[:, index].any()]
    if not absent:
        return
    names, wrongly = (
        shortened([classes[index].strip() for index in some], 5) for some in (absent, predicted)
    )
    log.info(
        "absent: %d of %d classes have no labelled pixel here (%s); no mean counts them%s",
        len(absent),
        len(classes),
        names,
        f", but an IoU of 0 for the {len(predicted)} that are predicted all the same ({wrongly})"
        * bool(predicted),
    )


def evaluate_datasets(
    forwards: Forwards,
    dataset: Any,
    options: EvaluationOptions,
    observers_of: Callable[[int, Any], Sequence[ImageObserver]] = lambda _, __: (),
) -> Evaluation:
    """`evaluate_dataset` for one data set, or for each of several that are joined: their scores under mmseg's names
    for them (0_mIoU, 1_mIoU, ...), and without a number those of all pixels together.

    observers_of(number, data set): the observers of each data set.
    """
    if not isinstance(dataset, ConcatDataset):
        return evaluate_dataset(forwards, dataset, options, observers_of(0, dataset))
    parts: list[Any] = dataset.datasets
    found = []
    for number, part in enumerate(parts):
        if options.verbose and options.world.is_main:
            name = getattr(part, "img_dir", type(part).__name__)
            log.info("data set %d of %d: %s", number, len(parts), name)
        found.append(evaluate_dataset(forwards, part, options, observers_of(number, part)))
    confusion = torch.stack([each.confusion for each in found]).sum(0)
    scores = _scores(parts[0], confusion, options.metrics)
    scores |= {
        f"{number}_{name}": value for number, each in enumerate(found) for name, value in each.metrics.items()
    }
    return Evaluation(
        scores,
        confusion,
        sum(each.images for each in found),
        [fault for each in found for fault in each.faults],
    )


def _scores(dataset: Any, confusion: Tensor, metrics: Sequence[str]) -> dict[str, float]:
    """mmseg's metrics of a confusion matrix (as of `Evaluation.confusion`). A class that neither the
    ground truth nor the prediction has gets no score (NaN, which JSON does not know)."""
    scores = dataset.evaluate([tuple(areas(confusion))], metric=list(metrics), logger="silent")
    return {
        name: round(float(value), 6)
        for name, value in scores.items()
        if not (is_of_one_class(name) and np.isnan(value))
    }


class ReadableImages:
    """This rank's images of a data set, with a progress bar on rank 0. Iterating yields those that can be
    read."""

    def __init__(
        self,
        dataset: Any,
        world: World,
        workers: int,
        device: torch.device,
        *,
        strict: bool,
        truth: bool = True,
        doing: str = "evaluating",
    ) -> None:
        """strict: one that cannot be read raises FaultError. truth: whether images have their ground
        truth. doing: the text of the progress bar."""
        self.dataset = dataset
        self.world = world
        self.workers = workers
        self.device = device
        self.strict = strict
        self.truth = truth
        self.doing = doing
        self.faults: list[str] = []
        """What is wrong with each image so far that cannot be read."""
        self.note: Callable[[], str] = lambda: ""
        """What is shown beside the count of images."""

    def __iter__(self) -> Iterator[EvaluationImage]:
        count = len(self.dataset)
        with progress(self.doing, count, "images", note=lambda: self.note()) as seen:
            for image in evaluation_images(
                self.dataset,
                rank=self.world.rank,
                world_size=self.world.size,
                workers=self.workers,
                device=self.device,
                truth=self.truth,
            ):
                if image.fault is None:
                    yield image
                elif self.strict:
                    raise FaultError(f"{image.fault} (without --strict it would be left out)")
                else:
                    self.faults.append(image.fault)
                # the other ranks, which take every other image, are about as far
                seen.advance(min(self.world.size, count - seen.done))

    def totals(self, done: int) -> tuple[int, list[str]]:
        """The number of images that all ranks have done, and what is wrong with the others, which is logged.
        Collective.

        done: of this rank. Raises DataError, on all ranks, when no image could be read.
        """
        by_rank = gather_from_ranks((done, self.faults))
        total = sum(number for number, _ in by_rank)
        faults = sorted(fault for _, some in by_rank for fault in some)
        if faults and not total:
            raise DataError(
                f"none of the {counted(len(faults), 'image')} can be read; the first: {faults[0]}"
            )
        if faults and self.world.is_main:
            log.warning(
                "%d of %s cannot be read and %s left out:\n  %s",
                len(faults),
                counted(len(faults) + total, "image"),
                are(len(faults)),
                "\n  ".join(faults),
            )
        return total, faults


def confusion_matrix(labels: Tensor, truth: Tensor, classes: int, ignore: int) -> Tensor:
    """The confusion matrix of one image, as of `Evaluation.confusion`: (classes + 1, classes + 1) int64.

    labels: (h, w) int64, the prediction. truth: (h, w), any integer type; pixels labelled `ignore` do not
    count.
    """
    kept = truth != ignore
    pairs = truth[kept].long().clamp(max=classes) * (classes + 1) + labels[kept].clamp(max=classes)
    return torch.bincount(pairs, minlength=(classes + 1) ** 2).view(classes + 1, classes + 1)


def areas(confusion: Tensor) -> Tensor:
    """Intersection, union, prediction and ground truth in pixels, (4, classes) float64, of a confusion
    matrix (classes + 1, classes + 1); mmseg's `intersect_and_union`, summed over images."""
    intersection = confusion.diagonal()[:-1]
    prediction = confusion.sum(0)[:-1]
    truth = confusion.sum(1)[:-1]
    return torch.stack([intersection, prediction + truth - intersection, prediction, truth]).double()


def image_score(confusion: Tensor) -> float | None:
    """Mean IoU over the classes that occur in one image or its prediction; None where no pixel is labelled.
    confusion: (classes + 1, classes + 1)."""
    intersection, union = areas(confusion)[:2]
    present = union > 0
    return (intersection[present] / union[present]).mean().item() if present.any() else None
