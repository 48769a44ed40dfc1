"""Segmenting one scene with a trained segmentor, in bounded memory.

In: an open scene and a `SlidingWindowInference`. Out: its label map on disk. Rows of windows are read, computed, added
up and written one after the other; each process of a run takes some rows of tiles, which the first one joins.
"""

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internseg_ds.distributed.device_memory import free_memory, processes_here
from internseg_ds.distributed.process_group import World, gather_from_ranks
from internseg_ds.errors import ConfigError, OutputError, counted
from internseg_ds.evaluation.scenes.blending import Blend, BlendedRows
from internseg_ds.evaluation.scenes.label_file import LabelFile, LabelFormat, label_file
from internseg_ds.evaluation.scenes.memory import DEFAULT_SHARE, SceneMemory
from internseg_ds.evaluation.scenes.outputs import SceneOutputs
from internseg_ds.evaluation.scenes.scene_file import Scene
from internseg_ds.evaluation.scenes.shapes import write_shapes
from internseg_ds.evaluation.scenes.windows import Piece, SceneWindows, Span
from internseg_ds.evaluation.sliding_window import SlidingWindowInference, Window
from internseg_ds.evaluation.visualization import Palette
from internseg_ds.output_files import whole_path
from internseg_ds.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SceneOptions:
    """How scenes are segmented."""

    blend: Blend = "mean"
    shapes: bool = False
    """Write the regions as GeoJSON too."""
    memory_gib: float | None = None
    """For the buffers of a row of windows; wider scenes are segmented in several pieces. None: a quarter of the
    device's free memory."""


class SceneSegmentation:
    """Segments scenes, one after the other, with one segmentor."""

    def __init__(
        self,
        inference: SlidingWindowInference,
        classes: list[str],
        palette: Palette,
        options: SceneOptions,
        world: World,
        device: torch.device,
    ) -> None:
        """inference: with windows (`check_slides`)."""
        self.inference = inference
        self.classes = classes
        self.palette = palette
        self.options = options
        self.world = world
        self.device = device

    def segment(self, scene: Scene, outputs: SceneOutputs) -> None:
        """Segment one scene. Collective. Raises FaultError where the file is damaged, OutputError where the disk is
        full."""
        test_cfg = self.inference.test_cfg
        grid = SceneWindows.over(scene.size, scene.padded, test_cfg.crop_size, test_cfg.stride)
        form = LabelFormat.of(scene.raster, self.inference.outputs, self.classes, self.palette)
        rows = grid.slab(self.world.rank, self.world.size)
        memory = SceneMemory.of(
            scene, self.inference.outputs, grid.window[0], min(test_cfg.stride[0], grid.window[0]), form.dtype
        )
        pieces = grid.pieces(rows, memory.widest(self._limit()))
        self._announce(scene, grid, pieces, memory)
        with cache_of_gdal(memory.cache):
            if self.world.size == 1:
                with whole_path(outputs.labels) as path, label_file(path, form, rows) as file:
                    self._segment_pieces(scene, pieces, file)
                self.inference.finish()
            else:
                self._share(scene, pieces, form, rows, outputs.labels)
            if outputs.shapes is not None and self.world.is_main:
                with whole_path(outputs.shapes) as path:
                    count = write_shapes(outputs.labels, path, self.classes)
                log.info("%s: %s", outputs.shapes, counted(count, "polygon"))

    def _limit(self) -> float:
        """Bytes for buffers."""
        if self.options.memory_gib is not None:
            return self.options.memory_gib * 2**30
        return free_memory(self.device, processes_here(self.world)) / DEFAULT_SHARE

    def _announce(self, scene: Scene, grid: SceneWindows, pieces: list[Piece], memory: SceneMemory) -> None:
        if not self.world.is_main:
            return
        computed = sum(piece.count for piece in pieces)
        log.info(
            "%s: %d x %d pixels, %d x %d windows of %d x %d; %s will take %.2f GiB beside the model and a forward pass "
            "(of it %.2f GiB GDAL's cache), whatever the scene's height%s",
            scene.path,
            *scene.size,
            len(grid.rows),
            len(grid.columns),
            *grid.window,
            counted(len(pieces), "piece"),
            memory.total(pieces) / 2**30,
            memory.cache / 2**30,
            f"; {computed} windows are computed, for those on borders of pieces belong to both"
            if len(pieces) > 1
            else "",
        )

    def _share(
        self, scene: Scene, pieces: list[Piece], form: LabelFormat, rows: tuple[int, int], out: Path
    ) -> None:
        """This process's rows in a file of their own, which rank 0 joins with the others'. Collective."""
        token = gather_from_ranks(uuid.uuid4().hex)[0]
        own = out.with_name(f".{out.name}.{token}.{self.world.rank}.partial")
        parts: list[tuple[Path, tuple[int, int]]] = []
        try:
            if pieces:
                with _names_output(out), label_file(own, form, rows) as file:
                    self._segment_pieces(scene, pieces, file)
            self.inference.finish()
            parts = [part for part in gather_from_ranks((own, rows)) if part[1][1] > part[1][0]]
            if self.world.is_main:
                if missing := next((path for path, _ in parts if not path.exists()), None):
                    raise OutputError(
                        f"{missing}, which another process has written, is not there; the folder of --out must be one "
                        "that all hosts share"
                    )
                with whole_path(out) as path, label_file(path, form, (0, scene.size[0])) as file:
                    file.copy(parts)
            gather_from_ranks(None)  # until they are read
        finally:
            with suppress(OSError):
                own.unlink(missing_ok=True)

    def _segment_pieces(self, scene: Scene, pieces: list[Piece], file: LabelFile) -> None:
        windows = sum(piece.count for piece in pieces)
        with progress("segmenting", windows, "windows") as done:
            for piece in pieces:
                self._segment_piece(scene, piece, file, done.advance)

    def _segment_piece(
        self, scene: Scene, piece: Piece, file: LabelFile, advance: Callable[[], None]
    ) -> None:
        rows = _Windows(scene, piece, self.device, advance)
        blended = BlendedRows(piece, self.inference.outputs, self.options.blend, self.device)

        def complete() -> Iterator[tuple[Span, Span, Tensor]]:
            for window, logits in self.inference.window_logits(rows):
                yield from blended.add(window, logits)
            yield from blended.rest()

        area = slice(piece.area.left - piece.left, piece.area.right - piece.left)
        for (top, bottom), (left, right), logits in complete():
            labels = np.full((bottom - top, piece.right - piece.left), file.form.nodata, file.form.dtype)
            if left < right:
                labels[:, left:right] = self.inference.best(logits).cpu().numpy()
            labels[rows.take_empty(bottom - top)] = file.form.nodata
            file.write(piece.area, top, labels[:, area])


class _Windows:
    """The windows of a piece with their pixels. Those where the scene has no data are left out, but for the first of a
    row of windows that has nothing else: rows are written, and let go of, as windows come."""

    def __init__(self, scene: Scene, piece: Piece, device: torch.device, advance: Callable[[], None]) -> None:
        self.scene = scene
        self.piece = piece
        self.device = device
        self.advance = advance
        self._empty = np.empty((0, piece.right - piece.left), bool)
        """Where the scene has no data, of rows from the first that no label map has yet."""

    def __iter__(self) -> Iterator[tuple[Window, Tensor, dict[str, Any]]]:
        pixels: Tensor | None = None
        empty = self._empty
        top = self.piece.rows[0][0]
        for windows, fresh in zip(
            self.piece.bands(), self.scene.rows_of(self.piece, self.device), strict=True
        ):
            passed, top = windows[0].top - top, windows[0].top
            added = fresh.pixels.to(self.device, non_blocking=True)
            pixels = added if pixels is None else torch.cat([pixels[:, passed:], added], dim=1)
            holes = fresh.empty if fresh.empty is not None else np.zeros(added.shape[1:], bool)
            empty = np.concatenate([empty[passed:], holes])
            self._empty = np.concatenate([self._empty, holes])
            without_data = np.logical_and.reduce(empty, axis=0)
            for window in windows:
                columns = slice(window.left - self.piece.left, window.right - self.piece.left)
                self.advance()
                if not without_data[columns].all() or (window is windows[0] and without_data.all()):
                    yield window, pixels[:, :, columns], self.scene.meta

    def take_empty(self, rows: int) -> np.ndarray:
        """Of the next rows, where the scene has no data: (rows, columns) bool."""
        taken, self._empty = self._empty[:rows], self._empty[rows:]
        return taken


def check_slides(test_cfg: Any, where: Any) -> None:
    """A scene takes windows. Raises ConfigError. where: the config."""
    if test_cfg["mode"] != "slide":
        raise ConfigError(
            f"model.test_cfg.mode={test_cfg['mode']!r} of {where} looks at an image whole, and scenes are segmented by "
            "windows; add --cfg-options model.test_cfg.mode=slide model.test_cfg.crop_size=512,512 "
            "model.test_cfg.stride=341,341, with the size of your training crops"
        )


@contextmanager
def cache_of_gdal(size: int) -> Iterator[None]:
    """With so many bytes for blocks of files; by default GDAL takes 5 % of the machine's memory."""
    import rasterio  # here: an optional package

    with rasterio.Env(GDAL_CACHEMAX=size):
        yield


@contextmanager
def _names_output(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; make room there, or choose another folder"
        ) from error
