"""What there is to see in one raster and in its label map, in memory that does not grow with the scene.

In: paths, a loader. Out: numbers, for the checks of `data.checks`, which judge.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from internseg_ds.data.rasters.files import open_raster
from internseg_ds.data.rasters.loading import LoadRaster
from internseg_ds.data.rasters.windows import Window, tiles
from internseg_ds.errors import DataError
from internseg_ds.seeding import derived_seed

SIDE = 512
"""Of the windows that are looked at, in pixels."""
FEW = 8
"""Windows of a scene that a first look is at, drawn by a fixed seed."""
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class RasterHead:
    """What the head of a raster says of the channels that are read."""

    size: tuple[int, int]
    """Height and width."""
    channels: int
    dtype: str
    driver: str


def raster_head(file: str, loader: LoadRaster) -> RasterHead:
    """Raises DataError for a file that is none, or has too few channels."""
    with open_raster(file) as dataset:
        numbers = loader.numbers(dataset)
        kinds = np.result_type(*(dataset.dtypes[number - 1] for number in numbers))
        return RasterHead((dataset.height, dataset.width), len(numbers), str(kinds), dataset.driver)


def apart(image: str, labels: str) -> float | None:
    """By how many pixels of the image its label map lies elsewhere on the Earth, at the corner where that is most. None
    where either does not say where it lies, or cannot be read, or they have other sides, which others judge."""
    try:
        with open_raster(image) as first, open_raster(labels) as second:
            size = (first.height, first.width)
            here, there = first.transform, second.transform
            crs, other = first.crs, second.crs
            if size != (second.height, second.width):
                return None
    except DataError:
        return None
    if here.is_identity or there.is_identity or here.is_degenerate:
        return None
    corners = [(column, row) for row in (0, size[0]) for column in (0, size[1])]
    placed = np.array([there * corner for corner in corners])
    if crs and other and crs != other:
        placed = _in_crs(placed, other, crs)
    moved = np.array([~here * (x, y) for x, y in placed]) - corners
    return float(np.abs(moved).max()) if np.isfinite(moved).all() else np.inf


def _in_crs(points: np.ndarray, theirs: Any, ours: Any) -> np.ndarray:
    """(n, 2) coordinates of another CRS; infinite where ours has none for them."""
    from rasterio.errors import RasterioError  # here: an optional package
    from rasterio.warp import transform

    try:
        return np.stack(transform(theirs, ours, *points.T), axis=1)
    except RasterioError:
        return np.full(points.shape, np.inf)


def nodata_of(file: str) -> int | None:
    """The number that the first channel of a raster calls no data. None where there is none, or the file cannot be
    read."""
    try:
        with open_raster(file) as dataset:
            value = dataset.nodatavals[0]
    except DataError:
        return None
    return int(value) if value is not None and float(value).is_integer() else None


def channel_moments(
    file: str, loader: LoadRaster, window: Window | None
) -> tuple[int, np.ndarray, np.ndarray]:
    """(pixels, mean, variance) of each channel (channels,) float64, over some windows, or the given one. Raises
    DataError."""
    with open_raster(file) as dataset:
        size = (dataset.height, dataset.width)
        some = [window] if window is not None else list(_some(size, FEW))
        values = [
            loader.read(dataset, part).reshape(part.height * part.width, -1).astype(np.float64)
            for part in some
        ]
    pixels = np.concatenate(values)
    return len(pixels), pixels.mean(0), pixels.var(0)


def digest_of(file: str) -> bytes:
    """xxh3 of a file, 128 bits."""
    found = xxhash.xxh3_128()
    with Path(file).open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            found.update(chunk)
    return found.digest()


def counted_by_windows(
    read: Callable[[str, Window], np.ndarray], file: str, window: Window | None, *, all_of_it: bool
) -> tuple[tuple[int, int], Counter[int], bool]:
    """(height and width of a label map, how often each number is in it, whether all of it was read).

    read: the numbers of a window (h, w). window: the one to be counted; None: of the whole file, all or some windows.
    Raises DataError.
    """
    with open_raster(file) as dataset:
        size = (dataset.height, dataset.width)
    few = list(_some(size, None if all_of_it else FEW)) if window is None else [window]
    counts: Counter[int] = Counter()
    for part in few:
        numbers, times = np.unique(read(file, part), return_counts=True)
        counts.update(dict(zip(numbers.tolist(), times.tolist(), strict=True)))
    return size, counts, window is not None or sum(counts.values()) == size[0] * size[1]


def _some(size: tuple[int, int], most: int | None) -> Iterator[Window]:
    """Windows of a scene, at most so many of them, in their order."""
    every = list(tiles(size, (SIDE, SIDE)))
    if most is None or len(every) <= most:
        yield from every
        return
    chosen: Any = np.random.default_rng(derived_seed(0, "windows", *size)).choice(
        len(every), most, replace=False
    )
    yield from (every[place] for place in sorted(chosen.tolist()))
