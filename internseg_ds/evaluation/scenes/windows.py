"""Which windows go over a scene, and in what pieces the scene is segmented.

The windows are those of launch/test.py over the whole scene, whatever the pieces: a piece is a rectangle of the
label map, and is made of the windows that touch it. So windows across the border of two pieces are computed for
both, and labels do not depend on how a scene is divided. Letters: (h, w) a size in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from internseg_ds.evaluation.sliding_window import Window, spans

TILE = 512
"""Side of a tile of the label map, in pixels; pieces of a scene begin at multiples of it."""
CHOICES = 8
"""Places, one tile apart, of which a border between two pieces takes the one under the fewest windows."""

Span = tuple[int, int]
"""Begin and end along one side, in pixels."""


@dataclass(frozen=True)
class SceneWindows:
    """The grid of windows over a scene."""

    height: int
    width: int
    """Of the scene, in pixels."""
    rows: list[Span]
    columns: list[Span]

    @classmethod
    def over(
        cls, size: tuple[int, int], padded: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
    ) -> "SceneWindows":
        """size: (height, width) of the scene; padded: that of the image that a test pipeline would make of it."""
        rows, columns = (spans(*side) for side in zip(padded, crop, stride, strict=True))
        return cls(*size, rows, columns)

    @property
    def count(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of a window."""
        return self.rows[0][1] - self.rows[0][0], self.columns[0][1] - self.columns[0][0]

    def piece(self, area: Window) -> "Piece":
        """area: of the label map."""
        return Piece(
            area, _touching(self.rows, area.top, area.bottom), _touching(self.columns, area.left, area.right)
        )

    def slab(self, rank: int, ranks: int) -> Span:
        """The rows of one of several processes: whole rows of tiles, as equal as can be; maybe none."""
        tiles = -(-self.height // TILE)
        first, last = (tiles * number // ranks * TILE for number in (rank, rank + 1))
        return min(first, self.height), min(last, self.height)

    def pieces(self, slab: Span, widest: int) -> list["Piece"]:
        """The rows of `slab` in pieces from left to right, whose windows cover at most `widest` pixels of a row, but
        a tile at least."""
        pieces = []
        left = 0
        while left < self.width and slab[1] > slab[0]:
            right = self._right_of(left, widest)
            pieces.append(self.piece(Window(*slab, left, right)))
            left = right
        return pieces

    def _right_of(self, left: int, widest: int) -> int:
        """Where a piece that begins at `left` ends."""
        fitting = [left + TILE]
        while fitting[-1] < self.width and self._covered(left, fitting[-1] + TILE) <= widest:
            fitting.append(fitting[-1] + TILE)
        if fitting[-1] >= self.width:
            return self.width
        # the last of the best ones: as wide as can be
        return min(
            reversed(fitting[-CHOICES:]), key=lambda place: len(_touching(self.columns, place - 1, place + 1))
        )

    def _covered(self, left: int, right: int) -> int:
        """Width in pixels of the windows that touch these columns."""
        touching = _touching(self.columns, left, min(right, self.width))
        return touching[-1][1] - touching[0][0]


@dataclass(frozen=True)
class Piece:
    """A rectangle of the label map, and the windows that touch it."""

    area: Window
    rows: list[Span]
    columns: list[Span]

    @property
    def left(self) -> int:
        return self.columns[0][0]

    @property
    def right(self) -> int:
        return self.columns[-1][1]

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.rows) * len(self.columns)

    def bands(self) -> Iterator[list[Window]]:
        """The windows of each row of windows, from above."""
        for row in self.rows:
            yield [Window(*row, *column) for column in self.columns]


def _touching(along: list[Span], begin: int, end: int) -> list[Span]:
    return [span for span in along if span[0] < end and span[1] > begin]
