"""What a data set of mmseg is made of: plain data sets inside wrappers, and what happens to their images."""

from collections.abc import Iterator
from typing import Any, TypeAlias

from mmseg.datasets import RepeatDataset

SegmentationDataset: TypeAlias = Any
"""One of mmseg's data sets, or a wrapper around some of them: `len`, `[index]` for the results of its
pipeline, CLASSES and PALETTE. mmseg has no types, and its data sets may be of anybody's classes."""


def wrappers(dataset: SegmentationDataset) -> Iterator[SegmentationDataset]:
    """The data set and all those inside it."""
    yield dataset
    for inner in (
        *getattr(dataset, "datasets", ()),
        *([dataset.dataset] if hasattr(dataset, "dataset") else []),
    ):
        yield from wrappers(inner)


def parts(dataset: SegmentationDataset) -> Iterator[SegmentationDataset]:
    """The data sets that a concatenation strings together, each with all that happens to its images; the data
    set itself where it is no concatenation."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from parts(part)
    elif isinstance(dataset, RepeatDataset):
        yield from parts(dataset.dataset)
    else:
        yield dataset


def plain_parts(dataset: SegmentationDataset) -> Iterator[SegmentationDataset]:
    """The data sets inside wrappers (`MultiImageMixDataset` too), in their order."""
    for part in parts(dataset):
        if hasattr(part, "dataset"):
            yield from plain_parts(part.dataset)
        else:
            yield part


def pipelines(dataset: SegmentationDataset) -> Iterator[list[Any]]:
    """All that happens to the images of each plain data set, the steps of its wrappers included."""
    for part in parts(dataset):
        if hasattr(part, "dataset"):
            yield from ([*steps, *getattr(part, "pipeline", ())] for steps in pipelines(part.dataset))
        else:
            yield part.pipeline.transforms
