"""Images of evaluations in a row: the image, its truth, and predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from internseg_ds.evaluation.visualization import overlay
from internseg_ds.monitoring.evaluation_record import NO_CLASS, EvaluatedImage, EvaluationRecord
from internseg_ds.run_report.class_scores import css_colour, data_url

HEIGHT = 180
"""Of a picture in pixels."""
WIDEST = 320
QUALITY = 80
SHOWN = 4
"""Of the images that are the same each time; a run may keep more for its trackers."""
IN_LEGEND = 12
"""Classes that are named under a strip: those of the largest area."""


@dataclass(frozen=True)
class Strip:
    """panels: title and data URL of each picture. legend: name and CSS colour of the classes in them."""

    name: str
    score: float | None
    panels: list[tuple[str, str]]
    legend: list[tuple[str, str]]


def fixed_strips(evaluations: Sequence[EvaluationRecord]) -> list[Strip]:
    """The images that are the same each time, with their predictions at each evaluation."""
    of_each = [
        {shown.name: shown for shown in evaluation.pictures if shown.sort == "fixed"}
        for evaluation in evaluations
    ]
    strips = []
    kept = list((of_each[-1] if of_each else {}).items())
    for place in np.linspace(0, len(kept) - 1, min(SHOWN, len(kept))).round().astype(int):
        name, newest = kept[place]
        predictions = [
            (f"step {evaluation.step:,}", shown[name].prediction)
            for evaluation, shown in zip(evaluations, of_each, strict=True)
            if name in shown
        ]
        strips.append(_strip(newest, predictions, evaluations[-1]))
    return strips


def extreme_strips(evaluation: EvaluationRecord, sort: str) -> list[Strip]:
    """The "best" or "worst" images of an evaluation."""
    return [
        _strip(shown, [("prediction", shown.prediction)], evaluation)
        for shown in evaluation.pictures
        if shown.sort == sort
    ]


def _strip(
    shown: EvaluatedImage, predictions: Sequence[tuple[str, np.ndarray]], evaluation: EvaluationRecord
) -> Strip:
    palette = evaluation.palette.tolist()
    panels = [("image", _url(shown.image))]
    for title, labels in (("ground truth", shown.truth), *predictions):
        same_size = cv2.resize(labels, shown.image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        panels.append((title, _url(overlay(shown.image, same_size.astype(np.int64), palette))))
    legend = _legend([shown.truth, predictions[-1][1]], evaluation.classes, palette)
    return Strip(shown.name, shown.score, panels, legend)


def _url(picture: np.ndarray) -> str:
    scale = min(1.0, HEIGHT / picture.shape[0], WIDEST / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return data_url(small, ".jpg", cv2.IMWRITE_JPEG_QUALITY, QUALITY)


def _legend(
    label_maps: Sequence[np.ndarray], classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> list[tuple[str, str]]:
    areas = np.zeros(len(classes), np.int64)
    for labels in label_maps:
        classed = labels[(labels != NO_CLASS) & (labels < len(classes))]
        areas += np.bincount(classed.ravel().astype(np.int64), minlength=len(classes))
    order = [place for place in np.argsort(-areas, kind="stable")[:IN_LEGEND] if areas[place]]
    return [(classes[place], css_colour(palette[place])) for place in order]
