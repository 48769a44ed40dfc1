"""What the page shows of one segmented image.

In: a `Segmentation`. Out: what viewer.js reads, a dictionary that JSON can hold: the picture and the label map at the
size that is shown, and areas and scores of the classes over the whole image.
"""

import base64
import zlib
from typing import Any

import cv2
import numpy as np

from internseg_ds.evaluation.segmenter import Segmentation

LONGEST = 1600
"""Pixels of the longer side that is shown at most."""
JPEG_QUALITY = 90


def contents(result: Segmentation, longest: int = LONGEST) -> dict[str, Any]:
    """Keys of the dictionary:

    width, height: of the image; shown_width, shown_height: of what is shown, its longer side at most `longest`.
    photo: a JPEG of it, as a data URL.
    labels: of each pixel that is shown the class (uint16, little-endian) and behind these the score in 255ths
    (uint8), row by row, both of the image's pixel in its middle; compressed by zlib, in base64.
    classes: of each class that occurs, the largest first: label, name, colour ([r, g, b], None for an output of the
    model that is no class), share of the image's area, and mean score of its pixels. mean_score: of all pixels.
    """
    height, width = result.labels.shape
    scale = min(1.0, longest / max(height, width))
    shown_height, shown_width = (max(1, round(side * scale)) for side in (height, width))
    middles = np.ix_(_middles(height, shown_height), _middles(width, shown_width))
    scores = np.clip(np.round(result.scores[middles] * 255), 0, 255).astype(np.uint8)
    packed = result.labels[middles].astype("<u2").tobytes() + scores.tobytes()
    photo = result.image
    if scale < 1:
        photo = cv2.resize(photo, (shown_width, shown_height), interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    return {
        "width": width,
        "height": height,
        "shown_width": shown_width,
        "shown_height": shown_height,
        "photo": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
        "labels": base64.b64encode(zlib.compress(packed, 1)).decode(),
        "classes": _classes(result),
        "mean_score": float(result.scores.mean(dtype=np.float64)),
    }


def _middles(side: int, shown: int) -> np.ndarray:
    """Of each of `shown` pixels, the one of `side` that its middle lies in: (shown,) int64."""
    return (2 * np.arange(shown) + 1) * side // (2 * shown)


def _classes(result: Segmentation) -> list[dict[str, Any]]:
    labels = result.labels.ravel()
    pixels = np.bincount(labels)
    sums = np.bincount(labels, weights=result.scores.ravel())
    return [
        {
            "label": label,
            "name": result.classes[label] if label < len(result.classes) else f"output {label}, no class",
            "colour": list(result.palette[label]) if label < len(result.palette) else None,
            "share": float(pixels[label] / labels.size),
            "score": float(sums[label] / pixels[label]),
        }
        for label in np.argsort(-pixels, kind="stable").tolist()
        if pixels[label]
    ]
