"""Scores of single classes over the evaluations of a run, and which classes are taken for which others."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from internseg_ds.monitoring.evaluation_record import EvaluationRecord
from internseg_ds.run_report.curves import thinned
from internseg_ds.run_report.records import RunRecords, Series

SPARK_WIDTH, SPARK_HEIGHT = 90, 22
SPARK_POINTS = 60
PAIRS = 15
"""Confusions that are listed: those of most pixels."""


@dataclass(frozen=True)
class ClassRow:
    """A class in the table. Scores are percent."""

    name: str
    colour: str
    """CSS; "" where it is not known."""
    newest: float
    highest: float
    highest_step: int
    change: float | None
    """Since the evaluation before."""
    spark: str
    """Points of a small curve."""
    share: float | None
    """Of the labelled pixels that are of this class."""


def class_rows(run: RunRecords, score: str = "IoU") -> list[ClassRow]:
    """The classes that occur and have a score at the newest evaluation, from the best to the worst."""
    prefix, newest = f"{score}.", run.evaluations[-1] if run.evaluations else None
    shares = _label_shares(newest) if newest is not None else {}
    colours = _colours(newest) if newest is not None else {}
    series = {
        key.removeprefix(prefix): of_class.finite
        for key, of_class in run.metrics.of.items()
        if key.startswith(prefix) and key in run.metrics.scores and of_class.last is not None
    }
    last = max((of_class.steps[-1] for of_class in series.values()), default=0)
    rows = [
        _row(name, of_class, colours.get(name, ""), shares.get(name))
        for name, of_class in series.items()
        # one that neither occurs nor is predicted any more has none at the last; one that is predicted and does not
        # occur has 0
        if of_class.steps[-1] == last and shares.get(name) != 0
    ]
    return sorted(rows, key=lambda row: -row.newest)


def _row(name: str, series: Series, colour: str, share: float | None) -> ClassRow:
    """series: of scores that are all there, at least one."""
    values = series.values.tolist()
    highest = int(series.values.argmax())
    return ClassRow(
        name,
        colour,
        values[-1],
        values[highest],
        int(series.steps[highest]),
        values[-1] - values[-2] if len(values) > 1 else None,
        _spark(series),
        share,
    )


def _label_shares(evaluation: EvaluationRecord) -> dict[str, float]:
    labelled = evaluation.confusion[:-1].sum(1)
    return dict(zip(evaluation.classes, (labelled / max(1, labelled.sum())).tolist(), strict=True))


def _colours(evaluation: EvaluationRecord) -> dict[str, str]:
    return {name: css_colour(rgb) for name, rgb in zip(evaluation.classes, evaluation.palette.tolist())}


def css_colour(rgb: Sequence[int]) -> str:
    return f"rgb({', '.join(str(int(value)) for value in rgb)})"


def _spark(series: Series) -> str:
    """The curve from 0 to 100 % in a small picture, by steps."""
    shown = thinned(series, SPARK_POINTS)
    first, last = shown.steps[0], shown.steps[-1]
    x = 2 + (shown.steps - first) / max(1.0, last - first) * (SPARK_WIDTH - 4)
    y = 2 + (1 - shown.values / 100) * (SPARK_HEIGHT - 4)
    return " ".join(f"{right:.1f},{down:.1f}" for right, down in zip(x.tolist(), y.tolist(), strict=True))


@dataclass(frozen=True)
class ConfusedPair:
    """Pixels of one class that were taken for another."""

    labelled: str
    predicted: str
    pixels: int
    share: float
    """Of the pixels of the first class."""


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix to look at, of the classes that occur."""

    step: int
    classes: list[str]
    picture: str
    """A data URL: a pixel for each pair, the true class down and the predicted one across."""
    shares: str
    """Base64 of (classes, classes) uint8: percent of the row, rounded."""
    pairs: list[ConfusedPair]
    right: float
    """Share of the labelled pixels that are predicted as their class."""


def confusion_of(evaluation: EvaluationRecord) -> Confusion | None:
    """None where no pixel is labelled."""
    matrix = evaluation.confusion[:-1, :-1]
    places = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    labelled = evaluation.confusion[:-1].sum(1)
    if not labelled.any():
        return None
    matrix = matrix[np.ix_(places, places)]
    names = [evaluation.classes[place] for place in places.tolist()]
    shares = matrix / np.maximum(labelled[places][:, None], 1)
    return Confusion(
        evaluation.step,
        names,
        _heat(shares),
        base64.b64encode(np.round(100 * shares).astype(np.uint8).tobytes()).decode(),
        _pairs(matrix, shares, names),
        float(np.diagonal(matrix).sum() / labelled.sum()),
    )


def _pairs(matrix: np.ndarray, shares: np.ndarray, names: Sequence[str]) -> list[ConfusedPair]:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    return [
        ConfusedPair(names[row], names[column], int(wrong[row, column]), float(shares[row, column]))
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]


def _heat(shares: np.ndarray) -> str:
    """A PNG as a data URL: blue on a transparent ground, which light and dark pages have their own of. By the
    square root of the share, so that one of 5 % can be seen."""
    strength = np.round(255 * np.sqrt(shares)).astype(np.uint8)
    blue = np.broadcast_to(np.array([235, 120, 30], np.uint8), (*shares.shape, 3))
    return data_url(np.dstack([blue, strength]), ".png")


def data_url(picture: np.ndarray, ending: str, *settings: int) -> str:
    """(h, w, 3) uint8 BGR, or (h, w, 4) with opacity -> a picture in a page."""
    kind = "jpeg" if ending == ".jpg" else "png"
    packed = cv2.imencode(ending, np.ascontiguousarray(picture), settings)[1].tobytes()
    return f"data:image/{kind};base64,{base64.b64encode(packed).decode()}"
