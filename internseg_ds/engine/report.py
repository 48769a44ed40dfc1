"""What an evaluation leaves to look at: results.json, per_class.csv, confusion.png, and the best and the worst images as overlays.

In: an `Evaluation`, and the images as they are scored. Out: files in one folder, complete when `write_report` returns.
"""

import csv
import heapq
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from internseg_ds.data.image_files import picture
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.distributed.process_group import World, of_all_ranks
from internseg_ds.engine.evaluator import Evaluation
from internseg_ds.engine.outputs import make_folder, whole_file, write_picture
from internseg_ds.engine.pictures import side_by_side


def write_report(evaluation: Evaluation, classes: Sequence[str], folder: Path) -> None:
    """Writes results.json, per_class.csv and confusion.png into `folder`. By one rank."""
    make_folder(folder)
    totals = {name: value for name, value in evaluation.metrics.items() if "." not in name}
    per_class: dict[str, dict[str, float]] = {name: {} for name in classes}
    for key, value in evaluation.metrics.items():
        score, _, name = key.partition(".")
        if name:
            per_class[name][score] = value
    with whole_file(folder / "results.json") as file:
        file.write(
            json.dumps(
                {
                    **totals,
                    "images": evaluation.images,
                    "pixels_of_no_class": int(evaluation.confusion[-1].sum()),
                    "predictions_of_no_class": int(evaluation.confusion[:, -1].sum()),
                    "not_read": evaluation.faults,
                    "classes": per_class,
                },
                indent=1,
            ).encode()
            + b"\n"
        )
    scores = list(dict.fromkeys(key.partition(".")[0] for key in evaluation.metrics if "." in key))
    _, _, predicted, labelled = evaluation.areas.long().tolist()
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["class", *scores, "labelled_pixels", "predicted_pixels"])
    for index, name in enumerate(classes):
        values = (per_class[name].get(score) for score in scores)
        writer.writerow(
            [
                name,
                *("" if value is None else f"{value:.4f}" for value in values),
                labelled[index],
                predicted[index],
            ]
        )
    with whole_file(folder / "per_class.csv") as file:
        file.write(table.getvalue().encode())
    draw_confusion(evaluation.confusion[:-1, :-1].double().numpy(), classes, folder / "confusion.png")


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], picture: Path) -> None:
    """Draws where the pixels of each class (rows of `confusion` (classes, classes)) went, as shares of the row. Classes that do not occur are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shown = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    names, counts = [classes[index] for index in shown], confusion[np.ix_(shown, shown)]
    shares = counts / np.maximum(confusion[shown].sum(1, keepdims=True), 1)
    side = 3.5 + 0.22 * len(names)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="predicted", ylabel="labelled", title="share of each class's pixels")
    image = axes.imshow(
        shares, norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="Blues"
    )  # a share of 5 % is to be seen
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= 30:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
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


class Shower:
    """Writes image | ground truth | prediction as PNGs while an evaluation runs: the first `count` images of the data set."""

    def __init__(self, dataset: Any, folder: Path, count: int) -> None:
        self.dataset, self.folder, self.count = dataset, folder, count
        make_folder(folder)

    def see(self, index: int, labels: np.ndarray, score: float | None) -> None:
        if index < self.count:
            path = Path(self.dataset.img_infos[index]["filename"]).with_suffix(".png")
            name = "_".join(part for part in path.parts if part not in (path.anchor, ".."))
            write_picture(self.folder / name[-200:], picture_of(self.dataset, index, labels))


class Extremes:
    """Keeps the predictions of the `count` best and worst images of this rank, and draws those of all ranks at the end."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.count = dataset, count
        self._heaps: dict[str, list[tuple[float, int, np.ndarray]]] = {"best": [], "worst": []}

    def see(self, index: int, labels: np.ndarray, score: float | None) -> None:
        if score is None:
            return
        kept = labels.astype(np.uint16)
        for heap, rank in ((self._heaps["best"], score), (self._heaps["worst"], -score)):
            heapq.heappush(heap, (rank, -index, kept))
            if len(heap) > self.count:
                heapq.heappop(heap)

    def write(self, folder: Path, world: World) -> None:
        """Writes folder/{best,worst}/01_SCORE_NAME.png, each by the rank that has it. Collective."""
        for name, heap in self._heaps.items():
            everyones = of_all_ranks([(rank, index) for rank, index, _ in heap])
            chosen = sorted((item for some in everyones for item in some), reverse=True)[: self.count]
            labels_of = {-index: labels for _, index, labels in heap}
            make_folder(folder / name)
            if world.is_main:
                for stale in (folder / name).glob("[0-9]*_[0-9]*_*.png"):
                    stale.unlink()
            if dist.is_initialized():
                dist.barrier()
            for place, (rank, index) in enumerate(chosen, 1):
                if -index in labels_of:
                    stem = Path(self.dataset.img_infos[-index]["filename"]).stem
                    write_picture(
                        folder / name / f"{place:02d}_{100 * abs(rank):.1f}_{stem}.png",
                        picture_of(self.dataset, -index, labels_of[-index]),
                    )


def picture_of(dataset: Any, index: int, labels: np.ndarray) -> np.ndarray:
    """image | ground truth | prediction of an image of an mmseg data set."""
    return side_by_side(
        picture(dataset, index),
        [("ground truth", ground_truth(dataset, index)), ("prediction", labels)],
        dataset.CLASSES,
        dataset.PALETTE,
    )
