"""The steps of a pipeline that read rasters: `LoadRaster` and `LoadRasterWindow`. LoadAnnotations behind one of them
reads the same window of the label map.

In: mmseg's results dict of one image. Out: the same dict with the image, (h, w, channels). Importing this module
registers both in mmseg's PIPELINES.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mmseg.datasets.builder import PIPELINES

from internseg_ds.data.rasters.files import open_raster, read_window
from internseg_ds.data.rasters.windows import WINDOW, Window, whole
from internseg_ds.errors import ConfigError, DataError, counted, short_repr

KEPT = (np.uint8, np.uint16, np.int16, np.float32)
"""Types that later steps compute with (OpenCV's); others become float32."""
MOST_CHANNELS = 128
"""CV_CN_MAX of OpenCV 5."""


@PIPELINES.register_module()
class LoadRaster:
    """Reads an image with rasterio: any number of channels, in the order of the file, of 8, 16 or 32 bits.

    channels: the numbers of those to read, from 1 on, in that order; None: all. tile: (height, width) in pixels;
    each window of that size is an image of the data set by itself, so that scenes of any size are evaluated in
    little memory. None: the image is read whole. nodata: what pixels become that the file, by its nodata value,
    says nothing of, and those that are NaN or infinite.

    Raises ConfigError for arguments that cannot be meant, and where rasterio is missing.
    """

    def __init__(
        self,
        channels: Sequence[int] | None = None,
        tile: Sequence[int] | None = None,
        nodata: float = 0,
    ) -> None:
        name = type(self).__name__
        if channels is not None and (not channels or not all(map(_is_positive, channels))):
            raise ConfigError(
                f"channels={short_repr(channels)} of {name} must be numbers of channels, from 1 on"
            )
        self.channels = None if channels is None else list(channels)
        self.tile = None if tile is None else size_of(tile, name, "tile")
        if isinstance(nodata, bool) or not isinstance(nodata, (int, float)) or not math.isfinite(nodata):
            raise ConfigError(f"nodata={short_repr(nodata)} of {name} must be a number")
        self.nodata = nodata

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds img, and what mmseg's LoadImageFromFile adds beside it. Raises DataError naming the file."""
        info = results["img_info"]
        file = os.path.join(results.get("img_prefix") or "", info["filename"])
        with open_raster(file) as dataset:
            window = info.get(WINDOW) or self.window_of((dataset.height, dataset.width))
            image = self.read(dataset, window)
            shown = _red_green_blue(dataset, self.numbers(dataset))
        return results | {
            WINDOW: window,
            "filename": file,
            "ori_filename": info["filename"],
            "img": image,
            "img_shape": image.shape,
            "ori_shape": image.shape,
            "pad_shape": image.shape,
            "scale_factor": 1.0,
            "img_norm_cfg": {
                "mean": np.zeros(image.shape[2], np.float32),
                "std": np.ones(image.shape[2], np.float32),
                "to_rgb": False,
            },
            "shown_channels": shown,
        }

    def window_of(self, scene: tuple[int, int]) -> Window:
        """The part of an image of this height and width that is read."""
        return whole(scene)

    def numbers(self, dataset: Any) -> list[int]:
        """The numbers of the channels that are read. Raises DataError where the file has fewer."""
        if self.channels is None:
            return list(range(1, dataset.count + 1))
        if max(self.channels) > dataset.count:
            raise DataError(
                f"raster {dataset.name} has {counted(dataset.count, 'channel')}, and channels="
                f"{self.channels} of {type(self).__name__} names number {max(self.channels)}"
            )
        return self.channels

    def read(self, dataset: Any, window: Window) -> np.ndarray:
        """A window of an open raster: (h, w, channels) in the file's type, or float32 where that is none of `KEPT`.
        Raises DataError naming the file."""
        numbers = self.numbers(dataset)
        if len(numbers) > MOST_CHANNELS:
            raise DataError(
                f"raster {dataset.name} has {len(numbers)} channels, and OpenCV, which resizes and normalises, takes "
                f"{MOST_CHANNELS} at most; choose some by channels=[...] of {type(self).__name__}"
            )
        image = read_window(dataset, *window[:4], channels=numbers)
        empty = _without_data(image, [dataset.nodatavals[number - 1] for number in numbers])
        if empty is not None and empty.any():
            if not _holds(image.dtype, self.nodata):
                raise DataError(
                    f"raster {dataset.name} has values of {image.dtype}, of which nodata={self.nodata:g} of "
                    f"{type(self).__name__} is none; write one that it can hold, such as 0"
                )
            image[empty] = self.nodata
        return image if image.dtype.type in KEPT else image.astype(np.float32)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(channels={self.channels}, tile={self.tile}, nodata={self.nodata})"


@PIPELINES.register_module()
class LoadRasterWindow(LoadRaster):
    """Draws a window of a scene and reads that alone: training crops of scenes of any size.

    crop_size: (height, width) in pixels; all of a side of a scene that is shorter. channels, nodata: as of
    `LoadRaster`. The position is drawn from numpy's global state, as mmseg's steps do it, so it follows from the seed.
    Larger windows than the network's, with mmseg's Resize and RandomCrop behind, train at several scales.
    """

    def __init__(
        self, crop_size: Sequence[int], channels: Sequence[int] | None = None, nodata: float = 0
    ) -> None:
        super().__init__(channels, nodata=nodata)
        self.crop_size = size_of(crop_size, type(self).__name__, "crop_size")

    def window_of(self, scene: tuple[int, int]) -> Window:
        height, width = (min(side, most) for side, most in zip(scene, self.crop_size))
        row = int(np.random.randint(scene[0] - height + 1))
        column = int(np.random.randint(scene[1] - width + 1))
        return Window(row, column, height, width, scene)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(crop_size={self.crop_size}, channels={self.channels}, nodata={self.nodata})"


def raster_loader(steps: Iterable[Any]) -> LoadRaster | None:
    """The step of a pipeline that reads rasters; None where there is none."""
    return next((step for step in steps if isinstance(step, LoadRaster)), None)


def size_of(given: Any, step: str, key: str) -> tuple[int, int]:
    """(height, width) of a setting. Raises ConfigError for what is no size."""
    if not isinstance(given, (list, tuple)) or len(given) != 2 or not all(map(_is_positive, given)):
        raise ConfigError(f"{key}={short_repr(given)} of {step} must be (height, width) in pixels")
    return given[0], given[1]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _without_data(image: np.ndarray, nodata: Sequence[float | None]) -> np.ndarray | None:
    """Which values (h, w, channels) say nothing; None where all do. nodata: of each channel."""
    empty = ~np.isfinite(image) if image.dtype.kind == "f" else None
    for place, value in enumerate(nodata):
        if value is None or np.isnan(value):
            continue
        missing = image[..., place] == value
        if missing.any():
            empty = np.zeros(image.shape, bool) if empty is None else empty
            empty[..., place] |= missing
    return empty


def _holds(kind: np.dtype, value: float) -> bool:
    """Whether a type of numbers has this one."""
    if kind.kind == "f":
        return True
    return float(value).is_integer() and np.iinfo(kind).min <= value <= np.iinfo(kind).max


def _red_green_blue(dataset: Any, numbers: Sequence[int]) -> tuple[int, ...]:
    """The places, among the channels that were read, of those to look at: as the file names red, green and blue, or
    else the first three, or the first one."""
    names = [dataset.colorinterp[number - 1].name for number in numbers]
    if {"red", "green", "blue"} <= set(names):
        return tuple(names.index(name) for name in ("red", "green", "blue"))
    return (0, 1, 2) if len(numbers) >= 3 else (0,)
