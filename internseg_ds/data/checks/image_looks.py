"""What there is to see in one image file: its head, whether it can be read, its colours, and what it is
recognised by.

In: the path of an image. Out: an `ImageLook`, small enough to be handed from process to process.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import xxhash

from internseg_ds.data.checks.image_findings import decoded
from internseg_ds.data.checks.looks import Head, read_head
from internseg_ds.data.rasters.loading import LoadRaster
from internseg_ds.data.rasters.looks import RasterHead, channel_moments, digest_of, raster_head
from internseg_ds.data.rasters.windows import Window
from internseg_ds.errors import DataError, counted

THUMBNAIL = 8
"""Sides of the picture in grey that images are recognised by, in pixels."""
REDUCED_FROM = 64
"""Least side in pixels of a JPEG that is decoded at an eighth of its size, where its size does not matter."""
JPEG, START_OF_SCAN, END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
"""Markers of JPEG (ITU-T T.81, table B.1)."""


@dataclass(frozen=True)
class ImageLook:
    """What is in one image file."""

    file: str
    head: Head | None = None
    damaged: str = ""
    """Why it cannot be read."""
    cut_short: bool = False
    """Whether it is a JPEG without an end: OpenCV 4 reads it, OpenCV 5 calls it damaged."""
    stored: str = ""
    """"4 channels of uint16", where that is more than 8-bit RGB."""
    digest: bytes = b""
    """xxh3 of the file, 128 bits."""
    thumbnail: bytes = b""
    """The image in grey, THUMBNAIL x THUMBNAIL uint8, each the mean of its part."""
    pixels: int = 0
    """How many `mean` and `variance` are of; 0 where they were not asked for."""
    mean: tuple[float, ...] = ()
    """Of R, G and B from 0 to 255; of the channels that are read of a raster, in their order."""
    variance: tuple[float, ...] = ()
    raster: bool = False
    """Whether it is read as a raster."""
    raster_head: RasterHead | None = None
    """Of a raster that can be read."""


def look_at_image(file: str, *, measured: bool) -> ImageLook:
    """measured: with mean and variance of its colours, for which each pixel of a JPEG is decoded; without,
    an eighth of its rows and columns is, which reads all of the file."""
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        return ImageLook(file, damaged=str(error.strerror))
    head = read_head(io.BytesIO(data))
    image = _image(data, head, measured)
    cut_short = data.startswith(JPEG) and _has_no_end(data)
    if image is None:
        reason = "ends early" if cut_short else "is no picture that OpenCV reads"
        return ImageLook(file, head, damaged=reason if data else "is empty")
    channels = 1 if image.ndim < 3 else image.shape[2]
    stored = f"{counted(channels, 'channel')} of {image.dtype}" if _is_more(image) else ""
    bgr = _as_bgr(image)
    grey = _thumbnail(bgr)
    digest = xxhash.xxh3_128_digest(data)
    if not measured:
        return ImageLook(file, head, "", cut_short, stored, digest, grey.tobytes())
    mean, deviation = cv2.meanStdDev(bgr)
    return ImageLook(
        file,
        head,
        "",
        cut_short,
        stored,
        digest,
        grey.tobytes(),
        bgr.shape[0] * bgr.shape[1],
        tuple(mean.ravel()[::-1].tolist()),
        tuple((deviation.ravel()[::-1] ** 2).tolist()),
    )


def look_at_raster(file: str, loader: LoadRaster, window: Window | None, *, measured: bool) -> ImageLook:
    """As `look_at_image`, of a raster, or of a window of it. It is recognised by its bytes alone, once for all its
    windows. measured: mean and variance over some windows."""
    try:
        head = raster_head(file, loader)
        pixels, mean, variance = channel_moments(file, loader, window) if measured else (0, (), ())
    except DataError as error:
        return ImageLook(file, damaged=str(error), raster=True)
    stored = f"{counted(head.channels, 'channel')} of {head.dtype}"
    first = window is None or (window.row, window.column) == (0, 0)
    return ImageLook(
        file,
        Head(head.size, 1, stored, head.driver),
        stored=stored,
        digest=digest_of(file) if first else b"",
        pixels=pixels,
        mean=tuple(map(float, mean)),
        variance=tuple(map(float, variance)),
        raster=True,
        raster_head=head,
    )


def _has_no_end(jpeg: bytes) -> bool:
    """Whether no end stands behind the last scan."""
    end = jpeg.rfind(END)
    return jpeg.find(START_OF_SCAN, max(0, end)) >= 0


def _image(data: bytes, head: Head | None, measured: bool) -> np.ndarray | None:
    array = np.frombuffer(data, np.uint8)
    if head is not None and head.format == "JPEG":
        reduced = not measured and min(head.stored) >= REDUCED_FROM
        flag = cv2.IMREAD_REDUCED_COLOR_8 if reduced else cv2.IMREAD_COLOR
        try:
            return cv2.imdecode(array, flag | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            return None
    return decoded(array)


def _thumbnail(bgr: np.ndarray) -> np.ndarray:
    """(THUMBNAIL, THUMBNAIL) uint8, of so many rows and columns as tell it."""
    stride = max(1, min(bgr.shape[:2]) // (16 * THUMBNAIL))
    some = np.ascontiguousarray(bgr[stride // 2 :: stride, stride // 2 :: stride])
    small = cv2.resize(some, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)


def _is_more(image: np.ndarray) -> bool:
    return image.dtype != np.uint8 or (image.ndim == 3 and image.shape[2] > 3)


def _as_bgr(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8, as OpenCV reads any picture "in colour"."""
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    elif image.dtype != np.uint8:
        image = np.clip(np.nan_to_num(image.astype(np.float32)), 0, 255).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] < 3:
        grey = image if image.ndim == 2 else image[..., 0]
        return cv2.cvtColor(np.ascontiguousarray(grey), cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(image[..., :3])
