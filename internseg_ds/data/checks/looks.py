"""What there is to see in one image and in its label map, without any judgement.

In: a plain data set of mmseg and the place of an image in it. Out: the head of the image file, and the numbers
of the label map.
"""

import logging
import os
from dataclasses import dataclass
from typing import IO, Any

import cv2
import numpy as np
from mmseg.datasets import CustomDataset
from mmseg.datasets.pipelines import LoadImageFromFile
from PIL import Image

from internseg_ds.data.label_maps import LoadLabelMap, annotation_of, loader_in, why_unreadable
from internseg_ds.data.orientation import TAG, TURNS
from internseg_ds.data.rasters.loading import LoadRaster, raster_loader
from internseg_ds.data.rasters.looks import apart, counted_by_windows, nodata_of, raster_head
from internseg_ds.data.rasters.windows import Window, window_of
from internseg_ds.errors import DataError, counted

log = logging.getLogger(__name__)

EXACT = 2**24
"""Pixels up to which OpenCV counts without rounding, for it counts in fp32."""
GDAL_NODATA = 42113
"""Tag of a TIFF (https://gdal.org/drivers/raster/gtiff.html)."""
SHOWN_COLOURS = 256
"""Colours of a label map in colours that are kept."""


@dataclass(frozen=True)
class Head:
    """What the head of a picture file says."""

    stored: tuple[int, int]
    """Height and width as they are stored."""
    turn: int
    """EXIF orientation, 1 to 8; 1 of a TIFF, which whatever reads it turns first, so that `stored` is turned too."""
    mode: str
    """Pillow's: "RGB", "L", "P" with a palette, "I;16"."""
    format: str | None


@dataclass(frozen=True)
class LabelLook:
    """What is in one label map."""

    file: str
    shape: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    """The different numbers in it, ascending, and in `pixels` how often each is there."""
    pixels: tuple[int, ...] = ()
    storage: str = ""
    """How it is stored: "PNG, palette"."""
    misfit: str = ""
    """In what its sides differ from those of its image, "" where they do not, or nothing is known of them."""
    turned: int = 1
    """The EXIF orientation of its image, where that explains the misfit; 1 where it does not."""
    image: str = ""
    fault: str = ""
    """Why it is no label map."""
    damaged: bool = False
    """Whether it cannot be read at all."""
    colours: frozenset[tuple[int, ...]] = frozenset()
    """(R, G, B) of its pixels, where it is a picture in colours."""
    partial: bool = False
    """Whether some windows of it were read, and not all of it."""
    nodata: int | None = None
    """The number that a TIFF, or a raster, calls no data."""
    apart: float = 0.0
    """By how many pixels it lies elsewhere on the Earth than its image, of rasters that say where."""


def read_head(source: str | IO[bytes], *, exif: bool = True) -> Head | None:
    """None where Pillow does not know the picture. exif: whether to look for a turn, for which Pillow decodes
    all of a PNG."""
    try:
        with Image.open(source) as image:
            turn = image.getexif().get(TAG, 1) if exif and image.format != "TIFF" else 1
            return Head(
                image.size[::-1], turn if turn in TURNS else 1, image.mode, getattr(image, "format", None)
            )
    except Exception as error:  # one that Pillow does not read may be fine for the loader
        log.debug("%s: %s", source, error)
        return None


def image_file(part: CustomDataset, index: int) -> str:
    """The path of an image."""
    return os.path.join(part.img_dir, part.img_infos[index]["filename"])


def label_file(part: CustomDataset, index: int) -> str | None:
    """The path of an image's label map; None where it has none."""
    info = part.img_infos[index]
    return os.path.join(part.ann_dir, info["ann"]["seg_map"]) if part.ann_dir and "ann" in info else None


def label_ending(part: CustomDataset) -> str:
    """Of its label maps' names; "" where it has none."""
    file = label_file(part, 0) if part.img_infos else None
    return os.path.splitext(file or "")[1]


def is_lossy(part: CustomDataset) -> bool:
    """Whether its label maps, as the first one, are in a format that changes numbers: JPEG, also under another name or
    in a TIFF."""
    file = label_file(part, 0) if part.img_infos else None
    if file is None or os.path.splitext(file)[1].lower() in (".jpg", ".jpeg"):
        return file is not None
    if not os.path.isfile(file):
        return False
    try:
        with Image.open(file) as image:
            return image.format == "JPEG" or image.info.get("compression") == "jpeg"
    except Exception as error:
        log.debug("%s: %s", file, error)
        return False


def image_loader(part: CustomDataset) -> LoadImageFromFile | None:
    """The step that reads the images of a data set, where it is mmseg's own and the only one."""
    steps = getattr(getattr(part, "pipeline", None), "transforms", ())
    loaders = [step for step in steps if isinstance(step, LoadImageFromFile)]
    return loaders[0] if [type(step) for step in loaders] == [LoadImageFromFile] else None


def raster_loader_of(part: CustomDataset) -> LoadRaster | None:
    """The step that reads the images of a data set, where it reads rasters."""
    return raster_loader(getattr(getattr(part, "pipeline", None), "transforms", ()))


def head_of(part: CustomDataset, index: int) -> Head | None:
    """What the head of an image says; None where it says nothing, or there is no such file."""
    file, loader = image_file(part, index), raster_loader_of(part)
    if not os.path.isfile(file):
        return None
    if loader is None:
        return read_head(file)
    try:
        head = raster_head(file, loader)
    except DataError as error:  # named when it is its turn
        log.debug("%s", error)
        return None
    return Head(head.size, 1, f"{counted(head.channels, 'channel')} of {head.dtype}", head.driver)


def heeds_exif(loader: LoadImageFromFile) -> bool:
    """Whether a loader turns pictures as EXIF says (mmcv's `imfrombytes`)."""
    return loader.color_type in ("color", "grayscale") and loader.imdecode_backend in ("cv2", "pillow")


def label_loader(part: CustomDataset, *, training: bool) -> LoadLabelMap | None:
    """What reads its label maps; None where that is a loader of the user's own, there are none, or a later
    step gives their numbers another meaning."""
    loader = loader_in(part) if training else part.gt_seg_map_loader
    if not isinstance(loader, LoadLabelMap) or part.ann_dir is None:
        return None
    return loader if loader.classes == len(part.CLASSES) else None


def look_at_labels(
    part: CustomDataset, index: int, loader: LoadLabelMap, head: Head | None, *, details: bool = False
) -> LabelLook | None:
    """head: of its image. details: what takes longer too: storage and colours. None where there is no such
    file."""
    results = annotation_of(part, index)
    file = os.path.join(results.get("seg_prefix") or "", results["ann_info"]["seg_map"])
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe would be waited for
        return None
    storage = _storage(file) if details else ""
    if loader.raster:
        return _look_at_raster(part, index, loader, head, file, window_of(results), storage, details=details)
    try:
        raw = loader.read(file)
    except DataError as error:
        return LabelLook(file, fault=str(error), storage=storage, colours=_colours(file, details))
    except Exception as error:  # of whatever decodes it
        return LabelLook(file, fault=why_unreadable(file, error), storage=storage, damaged=True)
    image = image_file(part, index)
    misfit, turned = _misfit(part, file, raw, head)
    numbers, pixels = counted_numbers(raw)
    return LabelLook(
        file,
        raw.shape,
        tuple(numbers.tolist()),
        tuple(pixels.tolist()),
        storage,
        misfit,
        turned,
        image,
        nodata=_nodata(file),
    )


def _look_at_raster(
    part: CustomDataset,
    index: int,
    loader: LoadLabelMap,
    head: Head | None,
    file: str,
    window: Window | None,
    storage: str,
    *,
    details: bool,
) -> LabelLook:
    """As `look_at_labels`, window by window; without `details`, at some windows of a large one."""
    try:
        size, counts, complete = counted_by_windows(loader.read, file, window, all_of_it=details)
    except DataError as error:
        return LabelLook(file, fault=str(error), storage=storage)
    image = image_file(part, index)
    sides = None if head is None else head.stored
    misfit = (
        f"{file} has {size[0]} x {size[1]} pixels and its image {sides[0]} x {sides[1]}"
        if sides not in (None, size)
        else ""
    )
    shape = size if window is None else (window.height, window.width)
    numbers = sorted(counts)
    return LabelLook(
        file,
        shape,
        tuple(numbers),
        tuple(counts[number] for number in numbers),
        storage,
        misfit,
        image=image,
        partial=not complete,
        nodata=nodata_of(file),
        apart=apart(image, file) or 0.0,
    )


def counted_numbers(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers in an array of whole numbers, and how often each is there."""
    if raw.dtype != np.uint8:
        return np.unique(raw, return_counts=True)
    if raw.ndim == 2 and raw.size < EXACT:  # some ten times faster than bincount, which makes 64 bits of all
        counts = (
            cv2.calcHist([np.ascontiguousarray(raw)], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        )
    else:
        counts = np.bincount(raw.ravel(), minlength=256)
    numbers = np.flatnonzero(counts)
    return numbers.astype(np.uint8), counts[numbers]


def _misfit(part: CustomDataset, file: str, raw: np.ndarray, head: Head | None) -> tuple[str, int]:
    """(what is wrong with the sides of a label map, the EXIF orientation that explains it, or 1)."""
    loader = image_loader(part)
    if loader is None or head is None:
        return "", 1
    turned = heeds_exif(loader) and head.turn >= 5
    sides = head.stored[::-1] if turned else head.stored
    if raw.shape == sides or (raw.ndim < 2 and raw.size == sides[0] * sides[1]):
        return "", 1
    text = f"{file} has {' x '.join(map(str, raw.shape))} pixels and its image {' x '.join(map(str, sides))}"
    return text, head.turn if head.turn >= 5 and raw.shape == sides[::-1] else 1


def _nodata(file: str) -> int | None:
    """What a TIFF calls no data, as GDAL writes it there."""
    if os.path.splitext(file)[1].lower() not in (".tif", ".tiff"):
        return None
    try:
        with Image.open(file) as image:
            value = float(str(getattr(image, "tag_v2", {}).get(GDAL_NODATA, "nan")).strip("\0 "))
    except Exception as error:  # none that Pillow reads
        log.debug("%s: %s", file, error)
        return None
    return int(value) if value.is_integer() else None


def _storage(file: str) -> str:
    head = read_head(file, exif=False)
    if head is None:
        return os.path.splitext(file)[1]
    bits = {"P": "palette", "1": "1 bit", "L": "8 bits", "I;16": "16 bits", "I": "32 bits"}
    return f"{head.format}, {bits.get(head.mode, head.mode)}"


def _colours(file: str, details: bool) -> frozenset[tuple[int, ...]]:
    if not details:
        return frozenset()
    try:
        with Image.open(file) as image:
            found: Any = image.convert("RGB").getcolors(2**24) or []
    except Exception as error:
        log.debug("%s: %s", file, error)
        return frozenset()
    most = sorted(found, reverse=True)[:SHOWN_COLOURS]
    return frozenset(colour for _, colour in most)
