"""Images under their labels: as they lie on disk, beside as the network sees them after the pipeline; and pairs of
images that are taken for copies of one another.

In: a data set and places in it, or files. Out: pictures (h, w, 3) uint8 BGR; of an image with labels the image left
and its overlay right.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.parallel import DataContainer
from mmseg.datasets.pipelines import Normalize

from internseg_ds.data.checks.looks import label_loader
from internseg_ds.data.checks.pipeline_steps import flat
from internseg_ds.data.checks.survey import drawn
from internseg_ds.data.dataset_parts import SegmentationDataset, parts, pipelines, plain_parts
from internseg_ds.data.image_files import loaded, picture, picture_of
from internseg_ds.data.label_maps import annotation_of, ground_truth
from internseg_ds.data.rasters.windows import window_of
from internseg_ds.data.samples import sample
from internseg_ds.errors import UserError, reason_of
from internseg_ds.evaluation.visualization import overlay
from internseg_ds.seeding import derived_seed

HEIGHT = 160
"""Of a picture in pixels."""


@dataclass(frozen=True)
class Shown:
    """One image. disk, network: (h, w, 3) uint8 BGR, None where it cannot be shown, as `fault` says."""

    file: str
    disk: np.ndarray | None
    network: np.ndarray | None
    fault: str = ""


def contact_sheet(dataset: SegmentationDataset, count: int) -> Iterator[Shown]:
    """Some images of a training set, the same ones every time."""
    for part, steps in zip(parts(dataset), pipelines(dataset), strict=True):
        plain = next(plain_parts(part))
        share = max(1, count * len(part) // max(1, len(dataset)))
        for index in drawn(part, share):
            yield _shown(part, plain, index, steps)


def scored_sheet(dataset: SegmentationDataset, count: int) -> Iterator[Shown]:
    """Some images of a validation set under the labels that they are scored by, the same ones every time."""
    plain = list(plain_parts(dataset))
    total = max(1, sum(map(len, plain)))
    for part in plain:
        for place in drawn(part, max(1, count * len(part) // total)):
            file = part.img_infos[place]["filename"]
            try:
                yield Shown(file, _pair(picture(part, place), ground_truth(part, place), part), None)
            except Exception as error:
                yield Shown(file, None, None, _fault(error))


def thumbnail(file: str) -> np.ndarray | None:
    """An image file at the height of the sheet; None where OpenCV reads none in it."""
    try:
        image = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    return None if image is None else _small(image)


def _shown(part: SegmentationDataset, plain: Any, index: int, steps: list[Any]) -> Shown:
    place = part.indices[index] if hasattr(part, "indices") else index % len(plain)
    file = plain.img_infos[place]["filename"]
    try:
        return Shown(file, _on_disk(plain, place), _for_network(part, index, steps, plain))
    except Exception as error:  # of anybody's steps, which read a damaged image first here
        return Shown(file, None, None, _fault(error))


def _on_disk(plain: Any, place: int) -> np.ndarray:
    """As the file is read, under the label map as it is read, before any other step."""
    np.random.seed(derived_seed(0, "contact sheet", place))  # where a window is drawn
    results = loaded(plain, place)
    image = picture_of(results)
    loader = label_loader(plain, training=True)
    if loader is None:
        return _pair(image, np.full(image.shape[:2], -1), plain)
    about = annotation_of(plain, place)
    file = f"{about['seg_prefix']}/{about['ann_info']['seg_map']}"
    labels = loader.to_classes(loader.read(file, window_of(results)), about.get("label_map"))
    return _pair(image, labels, plain)


def _for_network(part: SegmentationDataset, index: int, steps: list[Any], plain: Any) -> np.ndarray:
    """What the pipeline hands over, its Normalize undone."""
    seed = derived_seed(0, "contact sheet", index)
    np.random.seed(seed)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    results = sample(part, index)
    image, labels = (
        value.data if isinstance(value, DataContainer) else value
        for value in (results["img"], results["gt_semantic_seg"])
    )
    values = image.numpy().transpose(1, 2, 0)
    values = values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)
    normalize = next((step for step in flat(steps) if isinstance(step, Normalize)), None)
    if normalize is not None and np.size(normalize.mean) == 3:
        values = values * normalize.std + normalize.mean
        values = values[..., ::-1] if normalize.to_rgb else values
    return _pair(np.clip(np.round(values), 0, 255).astype(np.uint8), labels.numpy().squeeze(), plain)


def colours_of(plain: Any) -> list[list[int]]:
    """A colour (R, G, B) for each class: those of the data set's palette, or where it has others than one for each,
    some."""
    count = len(plain.CLASSES)
    try:
        colours = np.asarray(plain.PALETTE, np.uint8)
        if colours.shape == (count, 3):
            return colours.tolist()
    except (TypeError, ValueError, OverflowError):
        pass  # it is no palette at all
    return np.random.default_rng(0).integers(0, 256, (count, 3), np.uint8).tolist()


def _pair(image: np.ndarray, labels: np.ndarray, plain: Any) -> np.ndarray:
    labels = np.where(labels == plain.ignore_index, -1, labels.astype(np.int64))
    small = _small(image)
    if labels.shape != image.shape[:2]:
        labels = np.full(image.shape[:2], -1)
    labels = cv2.resize(labels.astype(np.int32), small.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return np.hstack(
        [small, np.full((HEIGHT, 4, 3), 255, np.uint8), overlay(small, labels, colours_of(plain))]
    )


def _fault(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else reason_of(error)


def _small(image: np.ndarray) -> np.ndarray:
    size = (max(1, round(image.shape[1] * HEIGHT / image.shape[0])), HEIGHT)
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
