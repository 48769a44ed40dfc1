"""How much memory a scene takes, before it starts: by arithmetic on the sizes of buffers.

Beside the model, a forward pass and Python itself, there are the logits and pixels under one row of windows, the rows
of the label map that are no whole tiles yet, and GDAL's cache of the file's blocks. None grows with the height of the
scene; all but the cache of a small file grow with its width, until the width that `widest` allows, beyond which a scene
is segmented in several pieces.
"""

from dataclasses import dataclass

import numpy as np

from internseg_ds.evaluation.scenes.scene_file import Scene
from internseg_ds.evaluation.scenes.windows import TILE, Piece

DEFAULT_SHARE = 4
"""The part of a device's free memory that buffers may take is one in so many; windows on their way need the rest."""
CACHED_BLOCK_ROWS = 2
LEAST_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SceneMemory:
    """Bytes that a piece takes."""

    per_column: int
    """Of a column of pixels, one pixel wide, under a row of windows, and of what is made of it."""
    label_bytes: int
    """Of a column of the label map, as far as it is not written yet."""
    cache: int
    """GDAL's, of the scene and of the label map."""

    @classmethod
    def of(
        cls, scene: Scene, outputs: int, window_height: int, stride: int, label: np.dtype
    ) -> "SceneMemory":
        """outputs: of the model. stride: between rows of windows, in pixels."""
        logits = (outputs + 1) * window_height * 4  # their sum and that of the weights, fp32
        # the largest logit and its number (int64), of the rows that are complete
        best = min(stride, window_height) * (4 + 8)
        # normalised: under the windows, with the next rows, joined to them anew, and read ahead; and as they are read
        pixels = scene.channels * 4 * (2 * window_height + 4 * stride)
        own = cls._bytes_of_a_column(scene)
        read = own * stride * 2
        tiles = (
            label.itemsize * (stride + 2 * TILE) + 2 * window_height
        )  # with two rows of tiles, and the holes
        block_rows = CACHED_BLOCK_ROWS * scene.block_rows_bytes
        written = CACHED_BLOCK_ROWS * TILE * scene.size[1] * label.itemsize
        return cls(logits + best + pixels + read, tiles, max(LEAST_CACHE_BYTES, block_rows + written))

    @staticmethod
    def _bytes_of_a_column(scene: Scene) -> int:
        return sum(np.dtype(kind).itemsize for kind in scene.raster.dtypes)

    def widest(self, limit: float) -> int:
        """Pixels across for which `limit` bytes suffice."""
        return int(limit // (self.per_column + self.label_bytes))

    def total(self, pieces: list[Piece]) -> int:
        """Bytes for the widest of some pieces, with the cache."""
        across = max((piece.right - piece.left for piece in pieces), default=0)
        return across * (self.per_column + self.label_bytes) + self.cache
