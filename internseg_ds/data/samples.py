"""Single images through the pipeline of their data set; one that fails is an error that names the file."""

import os
from typing import Any

import cv2
import numpy as np

from internseg_ds.data.class_balance import ClassBalancedDataset
from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.data.rasters.loading import raster_loader
from internseg_ds.errors import DataError, reason_of


def first_sample(dataset: SegmentationDataset, what: str, *, tolerated: int = 0) -> dict[str, Any]:
    """The first image of a data set that passes its pipeline; before it, at most `tolerated` may fail. Raises
    DataError with the message of the first that did."""
    first: DataError | None = None
    for index in range(min(tolerated + 1, len(dataset))):
        try:
            return sample(dataset, index)
        except DataError as error:
            first = first or error
    raise DataError(f"{what}: {first}") from first


def sample(dataset: SegmentationDataset, index: int) -> dict[str, Any]:
    """One image through its pipeline. Raises DataError naming the file that is at fault, or the image and the
    message of whichever transform refused."""
    try:
        return dataset[index]
    except DataError:
        raise
    except Exception as error:  # transforms are anybody's code
        image, labels, reads_rasters = _files(dataset, index)
        for file in () if reads_rasters else filter(None, (image, labels)):
            if not _is_picture(file):
                what = "is no picture that can be read" if os.path.exists(file) else "is not there"
                what += ": it is empty" if os.path.isfile(file) and not os.path.getsize(file) else ""
                raise DataError(f"{file} {what}; copy it again, or take the image away") from error
        if not reads_rasters and _to_nothing(error) and (size := _size_of(image)) is not None:
            raise DataError(
                f"image {image} of {size[0]} x {size[1]} pixels (height x width) cannot be resized: a side "
                "of it would have no pixel left; "
                "take it away, or cut it into pieces that are less narrow"
            ) from error
        if not reads_rasters and (stored := _not_in_colour(image)):
            raise DataError(
                f"image {image} has values of {stored}, which OpenCV does not read in colour; scale them to 0 to "
                "255 and save them as such, or train and segment with LoadRaster, or color_type='unchanged' of "
                "LoadImageFromFile"
            ) from error
        hint = "is the image, or its label map, damaged?"
        if isinstance(error, KeyError):
            hint = "does a step of the pipeline make it, before the one that asks for it?"
        raise DataError(f"the pipeline fails on image {image}: {reason_of(error)}; {hint}") from error


def _is_picture(file: str) -> bool:
    try:
        return cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED) is not None
    except (OSError, cv2.error):  # of an empty file
        return False


def _not_in_colour(file: str) -> str:
    """The type of numbers of a picture that OpenCV reads as it is alone; "" of one that it reads in colour too."""
    data = np.fromfile(file, np.uint8) if os.path.isfile(file) else np.empty(0, np.uint8)
    if not data.size or cv2.imdecode(data, cv2.IMREAD_COLOR) is not None:
        return ""
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    return "" if image is None else str(image.dtype)


def _to_nothing(error: Exception) -> bool:
    """Whether OpenCV was to make a picture of no width or no height."""
    return (
        isinstance(error, cv2.error)
        and getattr(error, "func", None) == "resize"
        and any(word in str(error) for word in ("inv_scale", "dsize"))
    )


def _size_of(file: str) -> tuple[int, int] | None:
    image = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED) if os.path.isfile(file) else None
    return None if image is None else image.shape[:2]


def _files(dataset: SegmentationDataset, index: int) -> tuple[str, str | None, bool]:
    """Image and label map of an entry, inside wrappers too; and whether they are read as rasters, whose loaders name
    files that are damaged themselves."""
    if isinstance(dataset, ClassBalancedDataset):
        return _files(dataset.dataset, dataset.indices[index])
    if hasattr(dataset, "dataset"):  # RepeatDataset
        return _files(dataset.dataset, index % len(dataset.dataset))
    for part in getattr(dataset, "datasets", ()):
        if index < len(part):
            return _files(part, index)
        index -= len(part)
    info = dataset.img_infos[index]
    labels = (
        os.path.join(dataset.ann_dir, info["ann"]["seg_map"])
        if getattr(dataset, "ann_dir", None) and "ann" in info
        else None
    )
    image = os.path.join(getattr(dataset, "img_dir", None) or "", info["filename"])
    return image, labels, raster_loader(getattr(dataset.pipeline, "transforms", ())) is not None
