"""Windows of scenes: which part of an image and of its label map is one sample.

In: sizes in pixels, and entries of data sets. Out: `Window`s, and entries that name one each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

WINDOW = "raster_window"
"""Where the results of a pipeline, and entries of a data set, have their `Window`."""


class Window(NamedTuple):
    """A part of a scene, in pixels of it."""

    row: int
    column: int
    height: int
    width: int
    scene: tuple[int, int]
    """Height and width of all of it."""


def whole(scene: tuple[int, int]) -> Window:
    """All of a scene of this height and width."""
    return Window(0, 0, *scene, scene)


def tiles(scene: tuple[int, int], size: Sequence[int]) -> Iterator[Window]:
    """Windows of at most `size` (height, width) that cover a scene once, row by row; the last ones of rows and
    columns are as small as what is left."""
    height, width = size
    for row in range(0, scene[0], height):
        for column in range(0, scene[1], width):
            yield Window(row, column, min(height, scene[0] - row), min(width, scene[1] - column), scene)


def with_window(info: Mapping[str, Any], window: Window) -> dict[str, Any]:
    """An entry of a data set, of mmseg's kind, for one window of its image and of its label map."""
    found = {**info, WINDOW: window}
    if "ann" in info:
        found["ann"] = {**info["ann"], WINDOW: window}
    return found


def window_of(results: Mapping[str, Any]) -> Window | None:
    """The window that a pipeline, or an evaluation, is at; None for images that are no scenes."""
    return results.get(WINDOW) or (results.get("ann_info") or {}).get(WINDOW)
