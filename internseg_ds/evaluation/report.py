"""What an evaluation leaves to look at: results.json, per_class.csv, confusion.png, and overlays of images.

In: an `Evaluation`, and the images as they are scored. Out: files in one folder, complete when `write_report`
returns.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from internseg_ds.data.image_files import picture
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.data.rasters.windows import WINDOW
from internseg_ds.distributed.process_group import World
from internseg_ds.evaluation.class_table import absent_classes, is_of_one_class
from internseg_ds.evaluation.evaluator import Evaluation
from internseg_ds.evaluation.highest import Highest
from internseg_ds.evaluation.visualization import side_by_side
from internseg_ds.monitoring.units import in_percent
from internseg_ds.output_files import make_folder, whole_file, write_picture

SMALLEST_LABEL = 0.005
"""Shares of a class's pixels below this get no number in confusion.png."""
MOST_LABELLED = 30
"""With more classes, confusion.png has colours only."""


def write_report(evaluation: Evaluation, classes: Sequence[str], folder: Path) -> None:
    """Write results.json, per_class.csv and confusion.png into `folder`, scores in percent. Called by one rank."""
    make_folder(folder)
    per_class: dict[str, dict[str, float]] = {name: {} for name in classes}
    metrics = in_percent(evaluation.metrics)
    for key, value in metrics.items():
        score, _, name = key.partition(".")  # mIoU, or IoU.wall
        if name:
            per_class[name][score] = value
    results = {
        "unit": "percent",
        **{name: value for name, value in metrics.items() if not is_of_one_class(name)},
        "images": evaluation.images,
        "pixels_of_no_class": int(evaluation.confusion[-1].sum()),
        "predictions_of_no_class": int(evaluation.confusion[:, -1].sum()),
        "absent_classes": [classes[index] for index in absent_classes(evaluation.confusion)],
        "not_read": evaluation.faults,
        "classes": per_class,
    }
    with whole_file(folder / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")
    with whole_file(folder / "per_class.csv") as file:
        file.write(_table(evaluation, classes, per_class).encode())
    draw_confusion(evaluation.confusion[:-1, :-1].double().numpy(), classes, folder / "confusion.png")


def _table(evaluation: Evaluation, classes: Sequence[str], per_class: dict[str, dict[str, float]]) -> str:
    """CSV with one row per class: its scores in percent, and how many pixels are labelled and predicted as it."""
    scores = list(dict.fromkeys(key.partition(".")[0] for key in evaluation.metrics if is_of_one_class(key)))
    _, _, predicted, labelled = evaluation.areas.long().tolist()
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["class", *(f"{score} %" for score in scores), "labelled_pixels", "predicted_pixels"])
    for index, name in enumerate(classes):
        cells = [f"{per_class[name][score]:.2f}" if score in per_class[name] else "" for score in scores]
        writer.writerow([name, *cells, labelled[index], predicted[index]])
    return table.getvalue()


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], picture: Path) -> None:
    """Draw, as a PNG, which classes the pixels of each class were predicted as, as shares of the row.

    confusion: (classes, classes) float64, rows: the true class. Classes that do not occur are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shown = np.flatnonzero(confusion.sum(0) + confusion.sum(1)).tolist()
    names = [classes[index] for index in shown]
    counts = confusion[np.ix_(shown, shown)]
    shares = counts / np.maximum(confusion[shown].sum(1, keepdims=True), 1)
    side = 3.5 + 0.22 * len(names)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="predicted", ylabel="labelled", title="share of each class's pixels")
    # the square root of the share, so that one of 5 % can be seen
    image = axes.imshow(shares, norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= MOST_LABELLED:
        for row, column in zip(*np.nonzero(shares >= SMALLEST_LABEL), strict=True):
            axes.text(
                column,
                row,
                f"{100 * shares[row, column]:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if shares[row, column] > 0.4 else "black",
            )
    figure.colorbar(image, shrink=0.6)
    with whole_file(picture) as file:
        figure.savefig(file, format="png")


class FirstImages:
    """An `ImageObserver` that writes image | ground truth | prediction as PNGs, of the first `count`
    images of the data set."""

    def __init__(self, dataset: Any, folder: Path, count: int) -> None:
        self.dataset = dataset
        self.folder = folder
        self.count = count

    def observe(self, index: int, labels: np.ndarray, score: float | None) -> None:
        if index < self.count:
            make_folder(self.folder)
            info = self.dataset.img_infos[index]
            path = Path(info["filename"]).with_suffix(f"{_place(info)}.png")
            # with its folders: images of several folders may have one name, and paths may be absolute
            name = "_".join(part for part in path.parts if part not in (path.anchor, ".."))
            write_picture(self.folder / name[-200:], picture_of(self.dataset, index, labels))


class BestAndWorst:
    """An `ImageObserver` that keeps the predictions of the `count` best and worst images of this rank, and
    draws those of all ranks at the end."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset = dataset
        # of (h, w) uint16, the labels
        self._kept = {name: Highest[np.ndarray](count) for name in ("best", "worst")}

    def observe(self, index: int, labels: np.ndarray, score: float | None) -> None:
        if score is not None:
            self._kept["best"].offer(score, index, lambda: labels.astype(np.uint16))
            self._kept["worst"].offer(-score, index, lambda: labels.astype(np.uint16))

    def write(self, folder: Path, world: World) -> None:
        """Write folder/{best,worst}/01_SCORE_NAME.png, each by the rank that has it. Collective."""
        for name, kept in self._kept.items():
            chosen, labels_of = kept.of_all_ranks(), kept.own()
            make_folder(folder / name)
            if world.is_main:
                for stale in (folder / name).glob("[0-9]*_[0-9]*_*.png"):
                    stale.unlink()
            if dist.is_initialized():
                dist.barrier()  # nobody writes before the old pictures are gone
            for rank, place in enumerate(chosen, 1):
                if place in labels_of:
                    order, index = place[0], -place[1]
                    info = self.dataset.img_infos[index]
                    stem = Path(info["filename"]).stem + _place(info)
                    write_picture(
                        folder / name / f"{rank:02d}_{100 * abs(order):.1f}_{stem}.png",
                        picture_of(self.dataset, index, labels_of[place]),
                    )


def _place(info: Mapping[str, Any]) -> str:
    """Where in its scene an image is, for its name: ".row_column"; "" where it is no window of a scene."""
    window = info.get(WINDOW)
    return "" if window is None else f".{window.row}_{window.column}"


def picture_of(dataset: Any, index: int, labels: np.ndarray) -> np.ndarray:
    """image | ground truth | prediction of an image of an mmseg data set; labels: (h, w), the prediction.
    Returns (H, W, 3) uint8 BGR."""
    return side_by_side(
        picture(dataset, index),
        [("ground truth", ground_truth(dataset, index)), ("prediction", labels)],
        dataset.CLASSES,
        dataset.PALETTE,
    )
