"""Pictures of an evaluation for trackers: images with their classes on them, the confusion matrix."""

from collections.abc import Sequence

import cv2
import numpy as np

from internseg_ds.monitoring.evaluation_record import EvaluatedImage, EvaluationRecord

OPACITY = 0.6
"""Of the colours of classes on an image."""
GAP = 4
"""Pixels between pictures."""
LEAST_SIDE = 300
"""Of the picture of a confusion matrix, in pixels."""


def panels(shown: EvaluatedImage, palette: np.ndarray) -> np.ndarray:
    """The image, its truth and its prediction from left to right. palette: (k, 3) uint8 RGB. Returns (H, W, 3) uint8
    RGB."""
    image = rgb(shown)
    strip = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    overlays = [_overlay(image, labels, palette) for labels in label_maps(shown)]
    return np.hstack([image, strip, overlays[0], strip, overlays[1]])


def rgb(shown: EvaluatedImage) -> np.ndarray:
    """(h, w, 3) uint8."""
    return np.ascontiguousarray(shown.image[..., ::-1])


def label_maps(shown: EvaluatedImage) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction at the image's size: (h, w) uint16, or NO_CLASS."""
    size = shown.image.shape[1::-1]
    truth, prediction = (
        cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        for labels in (shown.truth, shown.prediction)
    )
    return truth, prediction


def _overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    classed = labels < len(palette)
    colours = palette[np.where(classed, labels, 0)]
    mixed = np.rint((1 - OPACITY) * image + OPACITY * colours).astype(np.uint8)
    return np.where(classed[..., None], mixed, image)


def confusion_picture(evaluation: EvaluationRecord) -> np.ndarray:
    """Which classes (rows) are taken for which (columns), each row by its own pixels: the brighter, the more. Returns
    (H, W, 3) uint8 RGB."""
    matrix = evaluation.confusion[:-1, :-1].astype(np.float64)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    coloured = cv2.applyColorMap(np.rint(255 * shares).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    scale = -(-LEAST_SIDE // len(matrix))
    return np.ascontiguousarray(coloured.repeat(scale, 0).repeat(scale, 1))


def confused(evaluation: EvaluationRecord, most: int) -> list[tuple[str, str, int]]:
    """True class, predicted class and pixels, the pairs with the most pixels first; at most `most`, none without
    pixels."""
    matrix, names = evaluation.confusion[:-1, :-1], evaluation.classes
    order = np.argsort(-matrix, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, matrix.shape), strict=True)
    return [
        (names[true], names[taken], int(matrix[true, taken])) for true, taken in pairs if matrix[true, taken]
    ]


def class_rows(evaluation: EvaluationRecord) -> Sequence[tuple[str, float | None, int]]:
    """Name, IoU in percent (None where the class neither occurs nor is predicted) and true pixels of each class."""
    pixels = evaluation.confusion[:-1].sum(1)
    return [
        (name, round(100 * iou, 2) if np.isfinite(iou) else None, int(count))
        for name, iou, count in zip(evaluation.classes, evaluation.iou.tolist(), pixels, strict=True)
    ]


def sent_pictures(evaluation: EvaluationRecord, most: int) -> list[EvaluatedImage]:
    """Those that are the same at each evaluation, at most `most`."""
    return [shown for shown in evaluation.pictures if shown.sort == "fixed"][:most]
