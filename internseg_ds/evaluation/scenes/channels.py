"""Which channels of a raster a pipeline's first step would load, and in what order.

mmseg's LoadImageFromFile reads images with OpenCV, whole. Here a part of one is read with rasterio and made to what
OpenCV would have given.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from internseg_ds.data.rasters.files import read_window
from internseg_ds.data.rasters.loading import LoadRaster
from internseg_ds.data.rasters.windows import Window as RasterWindow
from internseg_ds.errors import ConfigError, DataError


class Loading(ABC):
    """The first step of a pipeline, for a part of an image."""

    as_float: bool = False
    """Whether values become float32."""

    @abstractmethod
    def check(self, raster: Any) -> None:
        """Raise DataError for a raster that this step cannot load."""

    @abstractmethod
    def read(self, raster: Any, row: int, column: int, height: int, width: int) -> np.ndarray:
        """A part of an open raster: (height, width, channels) or (height, width)."""


class ColourLoading(Loading):
    """8-bit images in colour: (h, w, 3) uint8 BGR of a raster in grey, RGB, RGB with a further channel, which is left
    out, or with a palette. Where a TIFF's further channel is alpha, OpenCV multiplies colours by it."""

    def __init__(self, as_float: bool) -> None:
        self.as_float = as_float

    def check(self, raster: Any) -> None:
        if raster.count not in (1, 3, 4) or set(raster.dtypes) != {"uint8"}:
            kinds = " and ".join(sorted(set(raster.dtypes)))
            raise DataError(
                f"{raster.name} has {raster.count} channel{'s' * (raster.count > 1)} of {kinds}, and this model was "
                "trained on 8-bit images in colour (LoadImageFromFile of data.test); give a scene of 3 channels of "
                "uint8, such as gdal_translate -ot Byte -b 1 -b 2 -b 3 makes, or a model trained with LoadRaster"
            )

    def read(self, raster: Any, row: int, column: int, height: int, width: int) -> np.ndarray:
        if _is_multiplied_by_alpha(raster):
            found = read_window(raster, row, column, height, width, channels=[3, 2, 1, 4]).astype(np.uint16)
            return ((found[..., :3] * found[..., 3:] + 127) // 255).astype(np.uint8)  # as libtiff rounds
        if raster.count >= 3:
            return read_window(raster, row, column, height, width, channels=[3, 2, 1])
        grey = read_window(raster, row, column, height, width)
        table = _palette(raster)
        return np.repeat(grey, 3, axis=2) if table is None else table[grey[..., 0]]


class RasterLoading(Loading):
    """`LoadRaster`: any channels of any type, by its own rules."""

    def __init__(self, step: LoadRaster) -> None:
        self.step = step

    def check(self, raster: Any) -> None:
        self.step.numbers(raster)

    def read(self, raster: Any, row: int, column: int, height: int, width: int) -> np.ndarray:
        scene = (raster.height, raster.width)
        return self.step.read(raster, RasterWindow(row, column, height, width, scene))


class UnchangedLoading(Loading):
    """Images as they are (color_type="unchanged"): in the order of OpenCV, BGR or BGRA, where it reads them."""

    def __init__(self, as_float: bool, opencv: bool) -> None:
        self.as_float = as_float
        self.opencv = opencv

    def check(self, raster: Any) -> None:
        """Whatever it is: the steps behind this one say how many channels they take."""

    def read(self, raster: Any, row: int, column: int, height: int, width: int) -> np.ndarray:
        order = {3: [3, 2, 1], 4: [3, 2, 1, 4]}.get(raster.count) if self.opencv else None
        found = read_window(raster, row, column, height, width, channels=order)
        return found[..., 0] if raster.count == 1 else found


def loading_of(step: Any) -> Loading:
    """Of the first step of a pipeline. Raises ConfigError for one whose images cannot be read by parts."""
    if type(step) is LoadRaster:
        return RasterLoading(step)
    if type(step).__name__ == "LoadImageFromFile":
        as_float = bool(step.to_float32)
        if step.color_type == "color":
            return ColourLoading(as_float)
        if step.color_type == "unchanged":
            return UnchangedLoading(as_float, step.imdecode_backend == "cv2")
    raise ConfigError(
        f"{step!r}, the first step of data.test's pipeline, reads images whole; scenes are read by parts, for which it "
        "must be LoadRaster, or LoadImageFromFile with color_type='color' or 'unchanged'"
    )


def _is_multiplied_by_alpha(raster: Any) -> bool:
    return (
        raster.driver == "GTiff"
        and raster.count == 4
        and raster.colorinterp[3].name == "alpha"
        and raster.tags(4, ns="IMAGE_STRUCTURE").get("ALPHA") != "PREMULTIPLIED"
    )


def _palette(raster: Any) -> np.ndarray | None:
    """(256, 3) uint8 BGR; None for a raster without."""
    if raster.colorinterp[0].name != "palette":
        return None
    table = np.zeros((256, 3), np.uint8)
    for value, colour in raster.colormap(1).items():
        table[value] = colour[2::-1]
    return table
