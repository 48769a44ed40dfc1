"""Pictures of segmentations: the image, the ground truth and the prediction side by side, with a legend.

In: images (h, w, 3) uint8 BGR as OpenCV reads them, labels (h, w) of class indices; any other number stands for none. Out: images of the same kind.
"""

from collections.abc import Sequence

import cv2
import numpy as np

PANEL_HEIGHT, PANEL_WIDTH = 256, 1600
FONT, FONT_SCALE, LINE = cv2.FONT_HERSHEY_SIMPLEX, 0.45, 20


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.6
) -> np.ndarray:
    """The image tinted with the colour (RGB) of each pixel's class; pixels of none stay as they are."""
    colours = np.asarray(palette, np.uint8)[:, ::-1]
    classed = (labels >= 0) & (labels < len(colours))
    tinted = cv2.addWeighted(image, 1 - opacity, colours[np.where(classed, labels, 0)], opacity, 0)
    return np.where(classed[..., None], tinted, image)


def side_by_side(
    image: np.ndarray,
    panels: Sequence[tuple[str, np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> np.ndarray:
    """The image and one overlay per (title, labels) next to it, with the classes that appear in a legend below, largest first."""
    scale = min(PANEL_HEIGHT / image.shape[0], PANEL_WIDTH / image.shape[1])
    size = (max(round(image.shape[1] * scale), 80), max(round(image.shape[0] * scale), 1))
    shown = [
        ("image", cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC))
    ]
    for title, labels in panels:
        enlarged = cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
        shown.append((title, overlay(shown[0][1], enlarged, palette)))
    strips = []
    for title, picture in shown:
        head = np.full((LINE + 4, picture.shape[1], 3), 255, np.uint8)
        cv2.putText(head, title, (4, LINE - 4), FONT, FONT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)
        strips.append(np.vstack([head, picture]))
        strips.append(np.full((strips[-1].shape[0], 6, 3), 255, np.uint8))
    row = np.hstack(strips[:-1])
    return np.vstack([row, _legend([labels for _, labels in panels], classes, palette, row.shape[1])])


def _legend(
    label_maps: Sequence[np.ndarray], classes: Sequence[str], palette: Sequence[Sequence[int]], width: int
) -> np.ndarray:
    areas = sum(
        np.bincount(labels[(labels >= 0) & (labels < len(classes))].astype(np.int64), minlength=len(classes))
        for labels in label_maps
    )
    present = [index for index in np.argsort(-areas, kind="stable") if areas[index]]
    x, y, entries = 6, 6, []
    for index in present:
        needed = 26 + cv2.getTextSize(classes[index], FONT, FONT_SCALE, 1)[0][0]
        if x > 6 and x + needed > width:
            x, y = 6, y + LINE
        entries.append((index, x, y))
        x += needed + 10
    legend = np.full((y + LINE + 2, width, 3), 255, np.uint8)
    for index, left, top in entries:
        red, green, blue = (int(value) for value in palette[index])
        cv2.rectangle(legend, (left, top), (left + 14, top + 12), (blue, green, red), -1)
        cv2.putText(
            legend, classes[index], (left + 19, top + 11), FONT, FONT_SCALE, (0, 0, 0), 1, cv2.LINE_AA
        )
    return legend
