"""The logits of overlapping windows, added up for one row of windows at a time.

In: windows from left to right and from above, with their logits. Out: the logits of rows of pixels that no later
window touches. Held are the rows under one row of windows, in fp32.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from internseg_ds.evaluation.scenes.windows import Piece, Span
from internseg_ds.evaluation.sliding_window import Window

Blend = Literal["mean", "tapered"]
"""How logits of overlapping windows become one: "mean", as launch/test.py has it; "tapered", a mean whose weights fall
in straight lines from the middle of each window to its borders, so that no seam is left where a window ends."""
BLENDS: tuple[Blend, ...] = get_args(Blend)


class BlendedRows:
    """Adds up the windows of a piece."""

    def __init__(self, piece: Piece, classes: int, blend: Blend, device: torch.device) -> None:
        self.piece = piece
        self.blend = blend
        height = piece.rows[0][1] - piece.rows[0][0]
        self.sums = torch.zeros(
            classes, height, piece.right - piece.left, device=device
        )  # fp32, as mmseg's mean
        self.weights = torch.zeros(height, piece.right - piece.left, device=device)
        self.band = 0
        """Number of the row of windows under way; its first row of pixels is the first one here."""
        self._taper: Tensor | None = None
        """The weights of the last window's size."""
        self._touched: dict[int, Span] = {}
        """Last row of a row of windows -> columns of the piece that its windows span; of those that are held."""

    def add(self, window: Window, logits: Tensor) -> Iterator[tuple[Span, Span, Tensor]]:
        """Add a window's logits (classes, h, w), any float dtype. Yields what it leaves complete: rows of pixels,
        columns of the piece, and their logits (classes, rows, columns) float32, which are gone once the next are
        asked for.

        Rows of windows, and windows in them, may be left out; where none is, logits are NaN. The columns are those
        between the outermost windows that touch rows nearby: empty parts of a scene cost little.
        """
        while window.top > self._top:
            yield from self._complete()
        rows = slice(window.top - self._top, window.bottom - self._top)
        columns = slice(window.left - self.piece.left, window.right - self.piece.left)
        weights = self._weights_of(window)
        self.sums[:, rows, columns] += logits if weights is None else logits * weights
        self.weights[rows, columns] += 1 if weights is None else weights
        left, right = self._touched.get(window.bottom, (columns.start, columns.stop))
        self._touched[window.bottom] = min(left, columns.start), max(right, columns.stop)

    def rest(self) -> Iterator[tuple[Span, Span, Tensor]]:
        """As `add`, what is left behind the last window."""
        while self.band < len(self.piece.rows):
            yield from self._complete()

    @property
    def _top(self) -> int:
        return self.piece.rows[self.band][0]

    def _complete(self) -> Iterator[tuple[Span, Span, Tensor]]:
        """The rows of pixels above the next row of windows, which are then let go of."""
        top, bottom = self.piece.rows[self.band]
        if self.band + 1 < len(self.piece.rows):
            bottom = self.piece.rows[self.band + 1][0]
        done = bottom - top
        spans = self._touched.values()
        left, right = min((span[0] for span in spans), default=0), max((span[1] for span in spans), default=0)
        sums, weights = self.sums[:, :, left:right], self.weights[:, left:right]
        yield (top, bottom), (left, right), sums[:, :done].div_(weights[:done])
        for kept in (*sums, weights):  # one class at a time: a copy of all would double the memory
            kept[: len(kept) - done] = kept[done:].clone()
            kept[len(kept) - done :] = 0
        self._touched = {last: span for last, span in self._touched.items() if last > bottom}
        self.band += 1

    def _weights_of(self, window: Window) -> Tensor | None:
        """(h, w) float32, above 0; None for 1 everywhere."""
        if self.blend == "mean":
            return None
        if self._taper is None or self._taper.shape != window.size:
            down, across = (_triangle(side, self.sums.device) for side in window.size)
            self._taper = torch.outer(down, across)
        return self._taper


def _triangle(side: int, device: torch.device) -> Tensor:
    """(side) float32: from 1 / side at both ends to 1 in the middle."""
    centres = (torch.arange(side, device=device) + 0.5) / side
    return 1 - (2 * centres - 1).abs()
