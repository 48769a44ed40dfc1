"""Raster files (GeoTIFF and whatever else GDAL reads), opened and read by window with rasterio.

In: a path; a window in pixels. Out: rasterio's dataset; an array of the window alone, so that a scene of any size
takes no more memory than the window and the file's own tiles under it.
"""

import os
import warnings
from typing import Any

import numpy as np

from internseg_ds.errors import ConfigError, DataError, reason_of


def open_raster(path: str | os.PathLike[str]) -> Any:
    """rasterio's dataset of a file, to be closed by the caller (it is a context manager).

    Raises ConfigError where rasterio is not installed, DataError for a file that is missing, damaged or no raster,
    and one whose values are complex.
    """
    rasterio = _rasterio()
    if not os.path.exists(path):
        raise DataError(f"there is no raster {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            dataset = rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise _unreadable(path, error) from error
    if dataset.count == 0 or any(kind.startswith("complex") for kind in dataset.dtypes):
        what = f"values of {dataset.dtypes[0]}" if dataset.count else "no channels of its own"
        dataset.close()
        raise DataError(f"raster {path} has {what}; give one with channels of real numbers")
    return dataset


def read_window(
    dataset: Any,
    row: int,
    column: int,
    height: int,
    width: int,
    *,
    fill: float = 0,
    channels: list[int] | None = None,
) -> np.ndarray:
    """A window of an open raster: (height, width, channels) in the file's dtype, contiguous.

    row, column: its upper left pixel, which may lie outside, as may the rest of it: `fill` stands there.
    channels: numbers of those to read from 1 on, as GDAL counts; all of them by default. Raises DataError where
    the file cannot be read there.
    """
    numbers = list(range(1, dataset.count + 1)) if channels is None else list(channels)
    kind = np.result_type(*(dataset.dtypes[number - 1] for number in numbers))
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + height, dataset.height), min(column + width, dataset.width)
    inside = bottom > top and right > left
    if inside:
        values = _read(dataset, numbers, (top, bottom), (left, right))
        if values.shape[1:] == (height, width):
            return values.transpose(1, 2, 0).astype(kind, order="C", copy=False)
    window = np.full((height, width, len(numbers)), fill, kind)
    if inside:
        window[top - row : bottom - row, left - column : right - column] = values.transpose(1, 2, 0)
    return window


def _read(dataset: Any, numbers: list[int], rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """(channels, h, w)."""
    rasterio = _rasterio()
    try:
        return dataset.read(numbers, window=(rows, columns))
    except rasterio.errors.RasterioError as error:
        raise _unreadable(dataset.name, error) from error


def _unreadable(path: Any, error: Exception) -> DataError:
    return DataError(
        f"raster {path} cannot be read: {reason_of(error.__cause__ or error)}; copy it again, or take it away"
    )


def _rasterio() -> Any:
    try:
        import rasterio  # here: an optional package
        import rasterio.errors
    except ImportError as error:
        raise ConfigError(
            f"rasters are read with rasterio, which cannot be imported ({error}); "
            'pip install "internseg-ds[rasters]", or pip install rasterio'
        ) from error
    return rasterio
