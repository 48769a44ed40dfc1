"""A first look at some files of a data set, before a run: what cannot be meant ends it, what is odd becomes a
warning in the log.

In: mmseg's data sets as `datasets.build_datasets` gives them. Out: warnings. Takes a second or two whatever
the size of the data set.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from mmseg.datasets import DATASETS, CustomDataset
from mmseg.datasets.pipelines import LoadImageFromFile
from PIL import Image

from internseg_ds.data.checks.other_endings import files_alike
from internseg_ds.data.dataset_parts import SegmentationDataset, plain_parts
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.data.label_maps import LoadLabelMap, annotation_of, loader_in
from internseg_ds.data.orientation import FIX, TURNS, is_square, orientation
from internseg_ds.errors import ConfigError, DataError, are, counted, shortened
from internseg_ds.seeding import derived_seed

log = logging.getLogger(__name__)

MAPS, SECONDS = 200, 2.0
"""Label maps that are read, and how long at most."""
DECODED = 8
"""Images that are decoded whole; of the others the head is read."""


@dataclass
class Counts:
    """What the label maps hold that were read."""

    maps: int = 0
    pixels: Counter[int] = field(default_factory=Counter)
    """By class; `ignore_index` and what is no class too."""
    numbers: set[int] = field(default_factory=set)
    """As they stand in the files."""
    unknown_labels: list[str] = field(default_factory=list)
    """Files with a number that is no class."""
    misfits: list[str] = field(default_factory=list)
    """Files of other sides than their images."""


def survey(dataset: SegmentationDataset, what: str, *, training: bool, tolerated: int = 0) -> list[str]:
    """Warnings about classes that never occur, numbers that are no class, files left out,
    images turned by EXIF or read with a loss.

    what: the data set's name in messages ("data.train"). training: whether it is trained on; tolerated: how
    many of its images may be damaged then. Raises DataError for files that are left out although they have
    label maps, for label maps to train on that do not fit their images, and where all label maps of a set to
    train on were read and hold but one class, or none.
    """
    parts = [
        part for part in plain_parts(dataset) if isinstance(part, CustomDataset) and part.CLASSES is not None
    ]
    warnings = [
        warning
        for part in parts
        for warning in (*_left_out(part, what), *_images(part, what), *_lossy(part, what))
    ]
    if parts:
        warnings += _classes(parts, what, training, tolerated)
    return warnings


def compare_zero_labels(train_entry: Any, val_set: SegmentationDataset, what: str) -> list[str]:
    """Label maps that are trained on and scored against must be read alike: warnings where two data sets of
    different kinds are not.

    train_entry: of the config; its data need not be on this machine. val_set: built; what: its name in
    messages. Raises ConfigError where two of one kind are not.
    """
    warnings = []
    for train, val in ((train, val) for train in leaf_datasets(train_entry) for val in plain_parts(val_set)):
        trained = [
            bool(step.get("reduce_zero_label"))
            for step in train.get("pipeline") or ()
            if step.get("type") == "LoadAnnotations"
        ]
        scored = getattr(val, "reduce_zero_label", None)
        if isinstance(getattr(val, "gt_seg_map_loader", None), LoadLabelMap):
            scored = val.gt_seg_map_loader.reduce_zero_label
        if not trained or scored is None or trained[0] == scored:
            continue
        difference = (
            f"reduce_zero_label={trained[0]} of LoadAnnotations in data.train.pipeline, and "
            f"reduce_zero_label={scored} of {what} "
            f"({type(val).__name__}): what is trained as class n is scored as class n "
            f"{'+' if trained[0] else '-'} 1"
        )
        kind = DATASETS.get(train["type"]) if isinstance(train.get("type"), str) else train.get("type")
        if kind is type(val) and (type(val) is not CustomDataset or train.get("data_root") == val.data_root):
            raise ConfigError(
                f"{difference}; write reduce_zero_label=True in both where 0 in the label maps stands for no "
                "class, and in neither where it is one"
            )
        warnings.append(f"{difference}, unless the label maps of the two sets differ in just this")
    return sorted(set(warnings))


def _steps(part: Any) -> Sequence[Any]:
    return getattr(getattr(part, "pipeline", None), "transforms", ())


def _drawn(part: CustomDataset, most: int) -> Iterator[int]:
    """Some of its images, the same ones every time."""
    order = np.random.default_rng(derived_seed(0, "survey", len(part))).permutation(len(part))
    yield from (int(index) for index in order[:most])


def _classes(parts: Sequence[CustomDataset], what: str, training: bool, tolerated: int) -> list[str]:
    """Warnings about what the label maps of a data set hold."""
    counts, total = Counts(), sum(map(len, parts))
    until = time.monotonic() + SECONDS
    for part in parts:
        loader = loader_in(part) if training else part.gt_seg_map_loader
        # no later step gives labels another meaning
        if (
            isinstance(loader, LoadLabelMap)
            and part.ann_dir is not None
            and loader.classes == len(part.CLASSES)
        ):
            _count(part, loader, max(1, MAPS * len(part) // total), until, counts)
    if not counts.maps:
        return []
    everything = f"all {total}" if counts.maps == total else f"the {counts.maps} (of {total:,})"
    if training and counts.maps == total:
        _check_several_classes(parts[0], counts, what, everything)
    return [
        *_missing_classes(parts[0], counts, what, everything),
        *_misfits(counts, what, everything, refused_above=tolerated if training else None),
        *_unknown_labels(parts[0], counts, what, everything, training),
    ]


def _check_several_classes(part: CustomDataset, counts: Counts, what: str, everything: str) -> None:
    """Raises DataError where all label maps together hold but one class of several, or none."""
    classes = part.CLASSES
    present = [index for index in counts.pixels if 0 <= index < len(classes)]
    if len(classes) > 1 and len(present) < 2:
        raise DataError(
            f"{what}: there is nothing to learn: of {len(classes)} classes {everything} label maps hold "
            f"{f'{classes[present[0]]} alone' if present else 'none'}"
            f"{_hint_of_255(part, counts) or '; are reduce_zero_label, classes and ignore_index right?'}"
        )


def _missing_classes(part: CustomDataset, counts: Counts, what: str, everything: str) -> Iterator[str]:
    missing = [
        str(name)
        for index, name in enumerate(part.CLASSES)
        if index not in counts.pixels and index != part.ignore_index
    ]
    if missing:
        yield (
            f"{what}: {len(missing)} of {len(part.CLASSES)} classes "
            f"{'occurs' if len(missing) == 1 else 'occur'} in none of {everything} label maps looked at: "
            f"{shortened(missing, 8)}{_hint_of_255(part, counts)}"
        )


def _hint_of_255(part: CustomDataset, counts: Counts) -> str:
    """The end of a message where files may use 255 for a class that counts as none."""
    if part.ignore_index != 255 or not counts.numbers <= {0, 255}:
        return ""
    return (
        f". They hold no number but {' and '.join(map(str, sorted(counts.numbers)))}, and 255 stands for no "
        f"class; if 255 is meant to be {part.CLASSES[-1]}, write {len(part.CLASSES) - 1} in its place"
    )


def _misfits(counts: Counts, what: str, everything: str, refused_above: int | None) -> Iterator[str]:
    """refused_above: how many label maps of other sides than their images are a warning; more of them raise
    DataError. None: any number is a warning."""
    if not counts.misfits:
        return
    misfit = (
        f"{what}: of {everything} label maps looked at, {counted(len(counts.misfits), 'has', 'have')} other "
        f"sides than their images: {shortened(counts.misfits, 2)}"
    )
    if refused_above is not None and len(counts.misfits) > refused_above:
        raise DataError(f"{misfit}; there must be one class per pixel")
    yield f"{misfit}; those images are left out"


def _unknown_labels(
    part: CustomDataset, counts: Counts, what: str, everything: str, training: bool
) -> Iterator[str]:
    if counts.unknown_labels:
        yield (
            f"{what}: of {everything} label maps looked at, "
            f"{counted(len(counts.unknown_labels), 'holds', 'hold')} a number that is no class, "
            f"and not {part.ignore_index} for none either; its pixels "
            f"{'would end the run' if training else 'count as wrong'}: {shortened(counts.unknown_labels, 2)}"
        )


def _count(part: CustomDataset, loader: LoadLabelMap, most: int, until: float, counts: Counts) -> None:
    for index in _drawn(part, most):
        if time.monotonic() > until and counts.maps:
            return
        results = annotation_of(part, index)
        file = os.path.join(results.get("seg_prefix") or "", results["ann_info"]["seg_map"])
        if os.path.exists(file) and not os.path.isfile(file):
            continue
        try:
            raw = loader.read(file)
        except Exception as error:  # a damaged one is named when it is its turn
            log.debug("%s: %s", file, error)
            continue
        if misfit := _misfit(part, index, file, raw):
            counts.misfits.append(misfit)
        numbers, pixels = _counted(raw)
        labels = loader.to_classes(numbers, results.get("label_map"))
        counts.maps += 1
        counts.numbers |= set(numbers.tolist())
        for label, count in zip(labels.tolist(), pixels.tolist(), strict=True):
            counts.pixels[label] += count
        if (strange := numbers[labels == loader.stranger]).size:
            counts.unknown_labels.append(f"{strange[0]} in {file}")


def _misfit(part: CustomDataset, index: int, file: str, raw: np.ndarray) -> str:
    """What is wrong with the sides of a label map, "" where nothing is, or nothing is known of the image's.
    An image that EXIF turns by 90 degrees may have either: the pipeline looks at those."""
    loaders = [step for step in _steps(part) if isinstance(step, LoadImageFromFile)]
    image = os.path.join(part.img_dir, part.img_infos[index]["filename"])
    if (
        [type(step) for step in loaders] != [LoadImageFromFile]
        or not os.path.isfile(image)
        or orientation(image) >= 5
    ):
        return ""
    try:
        with Image.open(image) as opened:
            sides = opened.size[::-1]
    except Exception as error:  # one that PIL does not read may be fine for the loader
        log.debug("%s: %s", image, error)
        return ""
    if raw.shape == sides or (raw.ndim < 2 and raw.size == sides[0] * sides[1]):
        return ""
    return f"{file} has {' x '.join(map(str, raw.shape))} pixels and its image {' x '.join(map(str, sides))}"


def _counted(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers in an array, and how often each is there."""
    if raw.dtype != np.uint8:
        return np.unique(raw, return_counts=True)
    counts = np.bincount(raw.ravel(), minlength=256)  # some ten times faster
    numbers = np.flatnonzero(counts)
    return numbers.astype(np.uint8), counts[numbers]


def _left_out(part: CustomDataset, what: str) -> Iterator[str]:
    """Files of the image folder whose names end almost as `img_suffix` says."""
    if (
        part.split is not None
        or type(part).load_annotations is not CustomDataset.load_annotations
        or not os.path.isdir(part.img_dir)
    ):
        return
    used = {info["filename"] for info in part.img_infos}
    found = list(files_alike(part.img_dir, part.img_suffix))
    if not found:
        return
    warning = (
        f"{what}: {counted(len(found), 'file')} of {part.img_dir} {are(len(found))} left out, for the "
        f"ending is {shortened(sorted({os.path.splitext(path)[1] for path, _ in found}))} and not "
        f"img_suffix={part.img_suffix!r} "
        f"({shortened(sorted(path for path, _ in found), 2)}); {len(used)} {are(len(used))} taken"
    )
    stems = {name[: -len(part.img_suffix)] for name in used}
    labelled = part.ann_dir is not None and all(
        os.path.exists(os.path.join(part.ann_dir, stem + part.seg_map_suffix)) for _, stem in found
    )
    if labelled and not any(stem in stems for _, stem in found):
        raise DataError(f"{warning}. All of them have label maps, so they are meant to be there: rename them")
    yield f"{warning}. Rename those that are meant to be there"


def _lossy(part: CustomDataset, what: str) -> Iterator[str]:
    if part.ann_dir is not None and part.seg_map_suffix.lower().endswith((".jpg", ".jpeg")):
        yield (
            f"{what}: label maps end in {part.seg_map_suffix}, a format that changes numbers a "
            "little, so that classes become others; save them as .png"
        )


def _images(part: CustomDataset, what: str) -> Iterator[str]:
    """Images that EXIF turns in a way that their label maps do not tell, and images of which the loader takes
    a part."""
    loader = next((step for step in _steps(part) if isinstance(step, LoadImageFromFile)), None)
    if loader is None or loader.color_type != "color":
        return
    files = [os.path.join(part.img_dir, part.img_infos[index]["filename"]) for index in _drawn(part, MAPS)]
    files = [file for file in files if os.path.isfile(file)]  # a pipe would keep the run waiting here
    until = time.monotonic() + SECONDS / 2
    turned, looked = [], 0
    for file in files:
        if time.monotonic() > until:
            break
        looked += 1
        if (turn := orientation(file)) in (2, 3, 4) or (turn >= 5 and is_square(file)):
            turned.append(file)
    if turned and part.ann_dir is not None:
        yield (
            f"{what}: EXIF {TURNS[orientation(turned[0])]} in {turned[0]} ({len(turned)} such images of "
            f"{looked} looked at), so it is read turned; "
            f"that its label map was drawn on the turned picture cannot be seen: {FIX}"
        )
    for file in files[:DECODED]:
        try:
            image = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED)
        except (OSError, cv2.error):
            continue
        channels = 1 if image is None or image.ndim < 3 else image.shape[2]
        if image is not None and (image.dtype != np.uint8 or channels > 3):
            yield (
                f"{what}: {file} has {channels} channel{'s' * (channels > 1)} of {image.dtype}, and is "
                "read as 3 of uint8; "
                "LoadImageFromFile(color_type='unchanged') reads all of it, for a backbone with as many "
                "in_channels"
            )
            return
