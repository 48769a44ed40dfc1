"""Pictures of segmentations: the image, the ground truth and the prediction side by side, with a legend.

In: images (h, w, 3) uint8 BGR as OpenCV reads them, labels (h, w) of class indices, any integer type; an
index outside the classes means "no class". Out: pictures (H, W, 3) uint8 BGR. Palettes hold a colour (R, G,
B), 0 to 255, for each class.
"""

from collections.abc import Sequence

import cv2
import numpy as np

PANEL_HEIGHT, PANEL_WIDTH = 256, 1600
"""Largest size of one image in a picture, in pixels."""
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
LINE = 20
"""Height of a line of text in pixels."""
GAP = 6
"""Pixels between panels, and around the legend."""
Palette = Sequence[Sequence[int]]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.6) -> np.ndarray:
    """Tint the image with the colour of each pixel's class; pixels of no class stay as they are.

    image: (h, w, 3) uint8 BGR, labels: (h, w). Returns (h, w, 3) uint8 BGR.
    """
    colours = np.asarray(palette, np.uint8)[:, ::-1]  # RGB -> BGR
    classed = (labels >= 0) & (labels < len(colours))
    tinted = cv2.addWeighted(image, 1 - opacity, colours[np.where(classed, labels, 0)], opacity, 0)
    return np.where(classed[..., None], tinted, image)


def side_by_side(
    image: np.ndarray, panels: Sequence[tuple[str, np.ndarray]], classes: Sequence[str], palette: Palette
) -> np.ndarray:
    """Draw the image, one overlay per (title, labels) next to it, and below a legend of the classes that
    occur, largest area first.

    image: (h, w, 3) uint8 BGR; labels of each panel: (h, w). Returns (H, W, 3) uint8 BGR.
    """
    scale = min(PANEL_HEIGHT / image.shape[0], PANEL_WIDTH / image.shape[1])
    # a very narrow image is widened so that its title can be read
    size = (max(round(image.shape[1] * scale), 80), max(round(image.shape[0] * scale), 1))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(image, size, interpolation=interpolation)
    pictures = [("image", resized)]
    for title, labels in panels:
        resized_labels = cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
        pictures.append((title, overlay(resized, resized_labels, palette)))
    strips: list[np.ndarray] = []
    for title, picture in pictures:
        head = np.full((LINE + 4, picture.shape[1], 3), 255, np.uint8)
        cv2.putText(head, title, (4, LINE - 4), FONT, FONT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)
        strips.append(np.vstack([head, picture]))
        strips.append(np.full((strips[-1].shape[0], GAP, 3), 255, np.uint8))
    row = np.hstack(strips[:-1])
    return np.vstack([row, _legend([labels for _, labels in panels], classes, palette, row.shape[1])])


def _legend(
    label_maps: Sequence[np.ndarray], classes: Sequence[str], palette: Palette, width: int
) -> np.ndarray:
    """label_maps: (h, w) each -> the legend, (H, width, 3) uint8 BGR: a coloured square and a name per
    class."""
    areas = np.zeros(len(classes), np.int64)
    for labels in label_maps:
        counted = labels[(labels >= 0) & (labels < len(classes))].astype(np.int64)
        areas += np.bincount(counted, minlength=len(classes))
    entries = []  # (class, left, top)
    x = y = GAP
    for index in np.argsort(-areas, kind="stable"):
        if areas[index] == 0:
            break  # so are all behind it
        needed = 26 + cv2.getTextSize(classes[index], FONT, FONT_SCALE, 1)[0][0]
        if x > GAP and x + needed > width:
            x = GAP
            y += LINE
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
