"""What an evaluation of a training leaves behind, for whatever shows it: the run's page, TensorBoard, Weights &
Biases.

In: scores, a confusion matrix, some images with ground truth and prediction. Out:
WORK_DIR/evaluations/step_N.npz, one file of numpy's for each evaluation, without pickles. Needs neither torch
nor the data set.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from internseg_ds.output_files import make_folder, whole_file

FOLDER = "evaluations"
"""In the work directory."""
NO_CLASS = 65535
"""Of pixels that have none, in the label maps of an `EvaluatedImage`."""
FILE = re.compile(r"step_(\d+)\.npz")
JPEG_QUALITY = 90

Sort = Literal["fixed", "best", "worst"]


@dataclass(frozen=True)
class EvaluatedImage:
    """An image of the validation set, at the size that it is shown in."""

    name: str
    """Its file, as the data set names it."""
    sort: Sort
    """"fixed": the same ones at each evaluation. "best", "worst": by `score` at this evaluation, in their
    order."""
    score: float | None
    """Mean IoU over the classes of this image, 0 to 1; None where no pixel is labelled."""
    image: np.ndarray
    """(h, w, 3) uint8 BGR."""
    truth: np.ndarray
    """(h, w) uint16, the class of each pixel, or NO_CLASS."""
    prediction: np.ndarray
    """(h, w) uint16, the class of each pixel."""


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation."""

    step: int
    time: float
    """Seconds since 1970, at its end."""
    images: int
    """How many were scored."""
    scores: Mapping[str, float]
    """mmseg's names (mIoU, IoU.wall, ...), values 0 to 1, as of `Evaluation.metrics`."""
    classes: Sequence[str]
    palette: np.ndarray
    """(classes, 3) uint8 RGB."""
    confusion: np.ndarray
    """(classes + 1, classes + 1) int64: pixels by true class (the last row: labels of no class) and predicted
    class (the last column: outputs of no class)."""
    pictures: Sequence[EvaluatedImage] = ()

    @property
    def iou(self) -> np.ndarray:
        """(classes) float64, 0 to 1: intersection over union of each class; NaN where it neither occurs nor is
        predicted."""
        intersection = np.diagonal(self.confusion)[:-1].astype(np.float64)
        union = (self.confusion.sum(0) + self.confusion.sum(1))[:-1] - intersection
        with np.errstate(invalid="ignore", divide="ignore"):
            return intersection / union

    def write(self, folder: Path) -> Path:
        """Writes folder/step_N.npz, over one of this step. Raises OutputError."""
        make_folder(folder)
        about = {
            "step": self.step,
            "time": self.time,
            "images": self.images,
            "scores": dict(self.scores),
            "classes": list(self.classes),
            "pictures": [
                {"name": shown.name, "sort": shown.sort, "score": shown.score} for shown in self.pictures
            ],
        }
        arrays = {
            "about": np.array(json.dumps(about)),
            "palette": self.palette,
            "confusion": self.confusion,
        }
        for number, shown in enumerate(self.pictures):
            arrays[f"image_{number}"] = _encoded(".jpg", shown.image, cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)
            arrays[f"truth_{number}"] = _encoded(".png", shown.truth)
            arrays[f"prediction_{number}"] = _encoded(".png", shown.prediction)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]  # its own option is none of these
        path = folder / f"step_{self.step}.npz"
        with whole_file(path) as file:
            file.write(packed.getvalue())
        return path


def _encoded(ending: str, picture: np.ndarray, *settings: int) -> np.ndarray:
    """The bytes of a picture file, (bytes) uint8."""
    return cv2.imencode(ending, picture, settings)[1].ravel()


def read_evaluation(path: Path, *, pictures: bool = True) -> EvaluationRecord:
    """pictures: whether to read those, too. Raises ValueError for a file that is damaged."""
    try:
        with np.load(path) as file:
            about: dict[str, Any] = json.loads(str(file["about"]))
            return EvaluationRecord(
                step=int(about["step"]),
                time=float(about["time"]),
                images=about["images"],
                scores=about["scores"],
                classes=about["classes"],
                palette=file["palette"],
                confusion=file["confusion"],
                pictures=[
                    EvaluatedImage(
                        **noted,
                        image=cv2.imdecode(file[f"image_{number}"], cv2.IMREAD_COLOR),
                        truth=cv2.imdecode(file[f"truth_{number}"], cv2.IMREAD_UNCHANGED),
                        prediction=cv2.imdecode(file[f"prediction_{number}"], cv2.IMREAD_UNCHANGED),
                    )
                    for number, noted in enumerate(about["pictures"] if pictures else ())
                ],
            )
    except Exception as error:  # whatever zip, zlib, NumPy's header, JSON and OpenCV say of flipped bytes
        raise ValueError(f"{path} is damaged: {error}") from error


def evaluation_files(folder: Path) -> dict[int, Path]:
    """The file of each step that was evaluated, in the order of steps."""
    found = {
        int(match[1]): path for path in folder.glob("step_*.npz") if (match := FILE.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def rewind_evaluations(folder: Path, start: int) -> None:
    """Takes away those behind step `start`, which a run that goes on from there makes again."""
    for step, path in evaluation_files(folder).items():
        if step > start:
            path.unlink(missing_ok=True)
