"""A label map on disk: a tiled, compressed GeoTIFF with the georeference of its scene and the colours of the classes,
written one row of tiles at a time.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internseg_ds.errors import reason_of
from internseg_ds.evaluation.scenes.windows import TILE, Span
from internseg_ds.evaluation.sliding_window import Window
from internseg_ds.evaluation.visualization import Palette
from internseg_ds.progress import progress

COMPRESSION = "deflate"
"""What every reader of GeoTIFF knows."""


@dataclass(frozen=True)
class LabelFormat:
    """What the label map of a scene looks like."""

    width: int
    dtype: np.dtype
    """uint8, or uint16 beyond 255 classes."""
    classes: Sequence[str]
    palette: Palette
    place: dict[str, Any]
    """CRS and transform, where the scene has them."""
    gcps: tuple[list[Any], Any] | None
    """Ground control points and their CRS, where the scene has them in place of a transform."""
    rpcs: Any

    @classmethod
    def of(cls, raster: Any, outputs: int, classes: Sequence[str], palette: Palette) -> "LabelFormat":
        """raster: of the scene, open. outputs: number of outputs of the model."""
        values = max(len(classes), outputs)
        # the largest value is that of no data, as it is that of ignored pixels in training labels
        dtype = np.dtype(np.uint8 if values <= np.iinfo(np.uint8).max else np.uint16)
        place = {"crs": raster.crs} if raster.crs is not None else {}
        if not raster.transform.is_identity:
            place["transform"] = raster.transform
        points = raster.gcps if raster.gcps[0] else None
        return cls(raster.width, dtype, classes, palette, place, points, raster.rpcs)

    @property
    def nodata(self) -> int:
        return int(np.iinfo(self.dtype).max)

    def profile(self, height: int) -> dict[str, Any]:
        """What rasterio opens a file to write with."""
        return {
            "driver": "GTiff",
            "height": height,
            "width": self.width,
            "count": 1,
            "dtype": self.dtype.name,
            "nodata": self.nodata,
            "tiled": True,
            "blockxsize": TILE,
            "blockysize": TILE,
            "compress": COMPRESSION,
            "BIGTIFF": "IF_SAFER",
            **self.place,
        }

    def describe(self, file: Any) -> None:
        """Colours, names of the classes, control points."""
        file.write_colormap(1, {number: tuple(colour) for number, colour in enumerate(self.palette)})
        file.update_tags(classes=json.dumps(list(self.classes), ensure_ascii=False))
        if self.gcps is not None:
            file.gcps = self.gcps
        if self.rpcs is not None:
            file.rpcs = self.rpcs


class LabelFile:
    """Some rows of a label map, as a file that is being written, in a thread of its own."""

    def __init__(self, file: Any, form: LabelFormat, rows: Span) -> None:
        self.file = file
        self.form = form
        self.rows = rows
        self._tiles: np.ndarray | None = None
        """(rows of a row of tiles, columns) of the piece under way, as far as they have come."""
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def write(self, area: Window, top: int, labels: np.ndarray) -> None:
        """The next rows of a piece, from above. area: of the piece. top: of `labels` (rows, columns of the area), of
        which those outside of the area are left out. Raises OSError."""
        first, last = max(top, area.top), min(top + len(labels), area.bottom)
        while first < last:
            tile = first // TILE * TILE  # pieces begin at whole tiles
            end = min(tile + TILE, area.bottom)
            if self._tiles is None:
                self._tiles = np.empty((end - tile, area.right - area.left), self.form.dtype)
            stop = min(last, end)
            self._tiles[first - tile : stop - tile] = labels[first - top : stop - top]
            if stop == end:
                self._submit(self._tiles, tile - self.rows[0], area.left)
                self._tiles = None
            first = stop

    def copy(self, parts: Sequence[tuple[Path, Span]]) -> None:
        """Take over the rows of other files. Raises OSError."""
        height = sum(last - first for _, (first, last) in parts)
        with progress("joining the rows of all processes", height, "rows") as done:
            for path, (first, last) in parts:
                with _as_os_error(), opened(path) as part:
                    for top in range(0, last - first, TILE):
                        bottom = min(top + TILE, last - first)
                        rows = part.read(1, window=((top, bottom), (0, self.form.width)))
                        self._submit(rows, first + top - self.rows[0], 0)
                        done.advance(bottom - top)

    def finish(self) -> None:
        """Wait for what is being written. Raises OSError."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """End the thread, whatever it has come to."""
        self._writer.shutdown()

    def _submit(self, tiles: np.ndarray, top: int, left: int) -> None:
        self.finish()
        self._writing = self._writer.submit(self._write, tiles, top, left)

    def _write(self, tiles: np.ndarray, top: int, left: int) -> None:
        window = ((top, top + tiles.shape[0]), (left, left + tiles.shape[1]))
        with _as_os_error():
            self.file.write(tiles, 1, window=window)


@contextmanager
def label_file(path: Path, form: LabelFormat, rows: Span) -> Iterator[LabelFile]:
    """A file for some rows of a label map, complete and read back once at the end of the block. Raises OSError where
    the disk is full."""
    with _as_os_error(), opened(path, "w", **form.profile(rows[1] - rows[0])) as file:
        form.describe(file)
        labels = LabelFile(file, form, rows)
        try:
            yield labels
            labels.finish()
        finally:
            labels.close()
    # GDAL may write the last tiles when it closes a file, and does not always say when it cannot
    with _as_os_error(), opened(path) as file:
        for top in range(0, file.height, TILE):
            file.read(1, window=((top, min(top + TILE, file.height)), (0, file.width)))


def opened(path: Path, mode: str = "r", **profile: Any) -> Any:
    """rasterio's file, a context manager; without its warning of images that have no georeference."""
    import rasterio  # here: an optional package
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, mode, **profile)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """rasterio's errors say to look at the one before them, which has the reason."""
    from rasterio.errors import RasterioError  # here: an optional package

    try:
        yield
    except RasterioError as error:
        raise OSError(reason_of(error.__cause__ or error)) from error
