"""Label maps of rasters, or windows of them: numbers, or colours.

In: a path, a window. Out: arrays. What the numbers stand for is decided elsewhere (`data.label_maps`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from internseg_ds.data.rasters.files import open_raster, read_window
from internseg_ds.data.rasters.windows import Window, whole
from internseg_ds.errors import DataError


def numbers_in(file: str, window: Window | None) -> np.ndarray:
    """(h, w, channels) as they are stored; a palette's numbers, not its colours. window: None for all of it. Raises
    DataError."""
    with _opened(file, window) as (dataset, part):
        return read_window(dataset, *part[:4])


def colours_in(file: str, window: Window | None) -> np.ndarray:
    """(R, G, B) of each pixel: (h, w, 3) uint8. Raises DataError where a file holds no colours."""
    with _opened(file, window) as (dataset, part):
        values = read_window(dataset, *part[:4])
        if values.dtype == np.uint8 and values.shape[2] in (3, 4):
            return values[..., :3]
        if values.dtype == np.uint8 and dataset.colorinterp[0].name == "palette":
            table = np.zeros((256, 3), np.uint8)
            for number, colour in dataset.colormap(1).items():
                table[number] = colour[:3]
            return table[values[..., 0]]
        raise DataError(
            f"label map {file} has {values.shape[2]} channels of {values.dtype}, and no colours of 8 bits; take "
            "colours out of the data set, and write label_map for its numbers"
        )


@contextmanager
def _opened(file: str, window: Window | None) -> Iterator[tuple[Any, Window]]:
    """Raises DataError where a label map has other sides than the scene that the window is of."""
    with open_raster(file) as dataset:
        size = (dataset.height, dataset.width)
        if window is not None and window.scene != size:
            raise DataError(
                f"label map {file} has {size[0]} x {size[1]} pixels and its image {window.scene[0]} x "
                f"{window.scene[1]}; it must have one class per pixel"
            )
        yield dataset, window or whole(size)
