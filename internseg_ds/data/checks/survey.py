"""A first look at some files of a data set, before a run: what cannot be meant ends it, what is odd becomes a
warning in the log.

In: mmseg's data sets as `datasets.build_datasets` gives them. Out: warnings. Takes a second or two whatever
the size of the data set; `scan` looks at all files in the same way.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from mmseg.datasets import CustomDataset

from internseg_ds.data.checks.file_findings import left_out, lossy
from internseg_ds.data.checks.findings import Finding, as_warnings
from internseg_ds.data.checks.image_findings import ImageTally, decoded, image_findings
from internseg_ds.data.checks.label_findings import Examined, label_findings
from internseg_ds.data.checks.label_tally import ClassOfNumber, LabelTally
from internseg_ds.data.checks.looks import (
    head_of,
    image_file,
    label_loader,
    look_at_labels,
    raster_loader_of,
    read_head,
)
from internseg_ds.data.dataset_parts import SegmentationDataset, plain_parts
from internseg_ds.data.rasters.findings import raster_findings
from internseg_ds.data.rasters.loading import LoadRaster
from internseg_ds.data.rasters.looks import RasterHead, raster_head
from internseg_ds.errors import DataError
from internseg_ds.seeding import derived_seed

MAPS, SECONDS = 200, 2.0
"""Label maps that are read, and how long at most."""
DECODED = 8
"""Images that are decoded whole; of the others the head is read."""


def survey(dataset: SegmentationDataset, what: str, *, training: bool, tolerated: int = 0) -> list[str]:
    """Warnings about classes that never occur, numbers that are no class, files left out,
    images turned by EXIF or read with a loss.

    what: the data set's name in messages ("data.train"). training: whether it is trained on; tolerated: how
    many of its images may be damaged then. Raises DataError for files that are left out although they have
    label maps, for label maps to train on that do not fit their images or their classes, and where all label
    maps of a set to train on were read and hold but one class, or none.
    """
    parts = looked_at(dataset)
    findings = [
        finding
        for part in parts
        for finding in (*left_out(part, parts, what), *_images(part, what), *lossy(part, what))
    ]
    warnings = as_warnings(findings)
    if parts:
        warnings += as_warnings(_classes(parts, what, training, tolerated))
    return warnings


def looked_at(dataset: SegmentationDataset) -> list[CustomDataset]:
    """The plain data sets in it whose files can be looked at."""
    return [
        part for part in plain_parts(dataset) if isinstance(part, CustomDataset) and part.CLASSES is not None
    ]


def drawn(part: CustomDataset, most: int) -> Iterator[int]:
    """Some of its images, the same ones every time."""
    order = np.random.default_rng(derived_seed(0, "survey", len(part))).permutation(len(part))
    yield from (int(index) for index in order[:most])


def _classes(parts: Sequence[CustomDataset], what: str, training: bool, tolerated: int) -> Iterator[Finding]:
    """What the label maps of a data set hold."""
    tally, total = LabelTally(), sum(map(len, parts))
    until = time.monotonic() + SECONDS
    loaders = [label_loader(part, training=training) for part in parts]
    for part, loader in zip(parts, loaders, strict=True):
        if loader is None:
            continue
        classes = ClassOfNumber(loader, part.label_map)
        for index in drawn(part, max(1, MAPS * len(part) // total)):
            if time.monotonic() > until and tally.maps:
                break
            look = look_at_labels(part, index, loader, head_of(part, index))
            if look is not None and not look.damaged:  # a damaged one is named when it is its turn
                tally.add(look, classes)
    if (first := next(filter(None, loaders), None)) is not None:
        about = Examined(what, parts[0], first, total, training, tolerated if training else None)
        yield from label_findings(tally, about)


def _images(part: CustomDataset, what: str) -> Iterator[Finding]:
    if (loader := raster_loader_of(part)) is not None:
        yield from _rasters(part, loader, what)
        return
    files = [image_file(part, index) for index in drawn(part, MAPS)]
    files = [file for file in files if os.path.isfile(file)]  # a pipe would keep the run waiting here
    until, tally = time.monotonic() + SECONDS / 2, ImageTally()
    for file in files:
        if time.monotonic() > until:
            break
        tally.add_head(file, read_head(file))
    for file in files[:DECODED]:
        with suppress(OSError):  # named when it is its turn
            if (image := decoded(np.fromfile(file, np.uint8))) is not None:
                tally.add_decoded(file, image)
    yield from image_findings(tally, part, what)


def _rasters(part: CustomDataset, loader: LoadRaster, what: str) -> Iterator[Finding]:
    until, heads = time.monotonic() + SECONDS / 2, list[tuple[str, RasterHead]]()
    for file in dict.fromkeys(image_file(part, index) for index in drawn(part, MAPS)):
        if time.monotonic() > until:
            break
        with suppress(DataError):  # named when it is its turn
            heads.append((file, raster_head(file, loader)))
    yield from raster_findings(heads, part, what)
