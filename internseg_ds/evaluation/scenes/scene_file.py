"""A scene: a raster file of any size, read by rows through the steps of a test pipeline.

In: an open raster. Out: normalised pixels, and where the scene has no data.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from internseg_ds.data.rasters.files import open_raster, read_window
from internseg_ds.errors import DataError, FaultError, counted, reason_of
from internseg_ds.evaluation.scenes.pixel_steps import PixelSteps
from internseg_ds.evaluation.scenes.windows import Piece
from internseg_ds.models.backbone import image_channels

PROBE = 8
"""Side in pixels of the part by which a scene is tried."""
ORIENTATION = "EXIF_Orientation"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Rows:
    """Some rows of the windows of a piece."""

    pixels: Tensor
    """(channels, rows, columns) float32, as the model takes them."""
    empty: np.ndarray | None
    """(rows, columns) bool: where the scene has no data; None where it has data everywhere. Padded pixels have none."""


class Scene:
    """An open scene. A context manager, which closes it."""

    def __init__(self, path: Path, steps: PixelSteps) -> None:
        """Raises DataError for a file that is no raster, or not one that the pipeline takes."""
        self.path = path
        self.steps = steps
        self.raster = open_raster(path)
        self.size: tuple[int, int] = (self.raster.height, self.raster.width)
        self.padded = steps.padded(*self.size)
        try:
            self._check()
        except BaseException:
            self.raster.close()
            raise

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        self.raster.close()

    def _check(self) -> None:
        orientation = self.raster.tags().get(ORIENTATION, "1")
        if orientation not in ("0", "1"):
            raise DataError(
                f"{self.path} is to be turned when it is shown (EXIF orientation {orientation}), and scenes are read "
                "as they are stored; store it turned, as jpegtran or ImageMagick's -auto-orient do"
            )
        self.steps.loading.check(self.raster)
        height, width = min(PROBE, *self.size), min(PROBE, *self.size)
        pixels, meta = self.steps(self.steps.loading.read(self.raster, 0, 0, height, width), str(self.path))
        self.channels = len(pixels)
        shape = {"img_shape": self.size, "ori_shape": self.size, "pad_shape": self.padded}
        self.meta = meta | {name: (*size, self.channels) for name, size in shape.items()}
        """mmseg's img_meta of the whole scene."""

    def check_model(self, segmentor: nn.Module) -> None:
        """Raise DataError where the model takes another number of channels. segmentor: also on the meta device."""
        taken = image_channels(segmentor)
        if self.channels != taken:
            raise DataError(
                f"{self.path} has {counted(self.channels, 'channel')} behind the pipeline of data.test, and the model "
                f"takes {taken}; give a scene of the channels that it was trained on"
            )

    @property
    def has_holes(self) -> bool:
        """Whether some pixels may have no data: by a nodata value, a mask, or an alpha channel."""
        return any(flag.name != "all_valid" for flags in self.raster.mask_flag_enums for flag in flags)

    @property
    def block_rows_bytes(self) -> int:
        """Bytes of the file's own blocks that lie across it, side by side; GDAL reads whole ones."""
        rows = max(block[0] for block in self.raster.block_shapes)
        return rows * self.raster.width * sum(np.dtype(kind).itemsize for kind in self.raster.dtypes)

    def rows_of(self, piece: Piece, device: torch.device) -> Iterator[Rows]:
        """The rows that each row of windows of a piece adds to the one before, read ahead by one. Raises FaultError
        where the file is damaged."""

        def read() -> Iterator[Rows]:
            bottom = piece.rows[0][0]
            for _, end in piece.rows:
                yield self._read(bottom, end, piece.left, piece.right, device)
                bottom = end

        return _ahead(read())

    def _read(self, top: int, bottom: int, left: int, right: int, device: torch.device) -> Rows:
        inside = min(bottom, self.size[0]) - top, min(right, self.size[1]) - left
        padding = (bottom - top - max(inside[0], 0), right - left - inside[1])
        if inside[0] <= 0:
            pixels, empty = torch.zeros(self.channels, 0, inside[1]), None
        else:
            pixels, empty = self._load(top, left, *inside)
        if any(padding):
            pixels = self.steps.pad(pixels, *padding)
            if empty is not None:
                empty = np.pad(empty, [(0, side) for side in padding], constant_values=True)
        return Rows(pixels.pin_memory() if device.type == "cuda" else pixels, empty)

    def _load(self, top: int, left: int, height: int, width: int) -> tuple[Tensor, np.ndarray | None]:
        import rasterio.errors  # here: an optional package

        try:
            loaded = self.steps.loading.read(self.raster, top, left, height, width)
            empty = None
            if self.has_holes:
                empty = self.raster.dataset_mask(window=((top, top + height), (left, left + width))) == 0
            elif all(map(_is_float, self.raster.dtypes)):  # without a nodata value, NaN and infinity say it
                empty = ~np.isfinite(read_window(self.raster, top, left, height, width)).any(axis=2)
        except DataError as error:
            raise FaultError(str(error)) from error
        except rasterio.errors.RasterioError as error:
            raise FaultError(f"the mask of {self.path} cannot be read: {reason_of(error)}") from error
        pixels, _ = self.steps(loaded, str(self.path))
        return pixels, empty if empty is not None and empty.any() else None


def _is_float(kind: str) -> bool:
    return np.dtype(kind).kind == "f"


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """`items`, each made in a thread of its own while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
