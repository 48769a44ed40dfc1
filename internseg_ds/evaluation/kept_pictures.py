"""Images of an evaluation to look at: a few that are the same each time, and the best and worst.

In: the images as they are scored. Out: an `EvaluationRecord`, on rank 0.
"""

import logging
import time
from typing import Any

import cv2
import numpy as np

from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.data.image_files import picture
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.distributed.process_group import World, gather_from_ranks
from internseg_ds.errors import reason_of
from internseg_ds.evaluation.evaluator import Evaluation
from internseg_ds.evaluation.highest import Highest
from internseg_ds.monitoring.evaluation_record import NO_CLASS, EvaluatedImage, EvaluationRecord, Sort

log = logging.getLogger(__name__)

FIXED, EXTREMES = 4, 3
"""How many images are the same each time, unless more are asked for, and how many of the best and of the worst are
kept."""
SIDE = 384
"""The longest side of a picture, in pixels."""


class KeptPictures:
    """An `ImageObserver` of one data set that keeps small predictions of this rank's images."""

    def __init__(self, dataset: Any, fixed: int = FIXED) -> None:
        self.dataset = dataset
        places = np.linspace(0, len(dataset) - 1, min(fixed, len(dataset))).round()
        self._places = {int(place): order for order, place in enumerate(places)}
        extremes = min(EXTREMES, len(dataset) // 2)
        # labels (h, w) uint16, and score
        self._kept: dict[Sort, Highest[tuple[np.ndarray, float | None]]] = {
            "fixed": Highest(fixed),
            "best": Highest(extremes),
            "worst": Highest(extremes),
        }

    def observe(self, index: int, labels: np.ndarray, score: float | None) -> None:
        def kept() -> tuple[np.ndarray, float | None]:
            return _small(labels.astype(np.uint16)), score

        if index in self._places:
            self._kept["fixed"].offer(-self._places[index], index, kept)
        if score is not None:
            self._kept["best"].offer(score, index, kept)
            self._kept["worst"].offer(-score, index, kept)

    def gathered(self) -> list[EvaluatedImage]:
        """Those of all ranks: the fixed ones, then the best from the very best, then the worst from the very
        worst. One that cannot be shown is left out, with a line in the log. Collective."""
        chosen = [(sort, place) for sort, kept in self._kept.items() for place in kept.of_all_ranks()]
        own = {
            (sort, place): self._picture(sort, -place[1], score, labels)
            for sort, kept in self._kept.items()
            for place, (labels, score) in kept.own().items()
            if (sort, place) in chosen
        }
        of_all = {key: shown for some in gather_from_ranks(own) for key, shown in some.items()}
        return [shown for key in chosen if (shown := of_all.get(key)) is not None]

    def _picture(
        self, sort: Sort, index: int, score: float | None, labels: np.ndarray
    ) -> EvaluatedImage | None:
        name = str(index)
        try:
            name = self.dataset.img_infos[index]["filename"]
            truth = ground_truth(self.dataset, index).astype(np.int64)
            truth = np.where((truth >= 0) & (truth < len(self.dataset.CLASSES)), truth, NO_CLASS)
            return EvaluatedImage(
                name,
                sort,
                score,
                _small(picture(self.dataset, index), cv2.INTER_AREA),
                _small(truth.astype(np.uint16)),
                labels,
            )
        except Exception as error:  # whatever a data set of somebody's raises: no reason not to train
            log.warning("image %s is left out of the evaluation's pictures: %s", name, reason_of(error))
            return None


def _small(picture: np.ndarray, interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    """(h, w) or (h, w, 3) -> the same with sides of at most SIDE pixels."""
    height, width = picture.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    return cv2.resize(picture, size, interpolation=interpolation)


class KeptEvaluation:
    """One evaluation of a validation set, or of several that are joined, of which a record is to be kept."""

    def __init__(self, fixed: int = FIXED) -> None:
        """fixed: how many images of each data set are to be the same each time; at least FIXED are."""
        self._fixed = max(fixed, FIXED)
        self._parts: list[KeptPictures] = []

    def observers(self, _number: int, dataset: Any) -> list[KeptPictures]:
        """Of each data set, for `evaluate_datasets`."""
        self._parts.append(KeptPictures(dataset, self._fixed))
        return self._parts[-1:]

    def record(
        self, step: int, evaluation: Evaluation, val_set: SegmentationDataset, world: World
    ) -> EvaluationRecord | None:
        """The record, on rank 0. Collective."""
        pictures = [shown for part in self._parts for shown in part.gathered()]
        if not world.is_main:
            return None
        return EvaluationRecord(
            step=step,
            time=time.time(),
            images=evaluation.images,
            scores=evaluation.metrics,
            classes=list(val_set.CLASSES),
            palette=np.asarray(val_set.PALETTE, np.uint8).reshape(-1, 3),
            confusion=evaluation.confusion.numpy(),
            pictures=pictures,
        )
