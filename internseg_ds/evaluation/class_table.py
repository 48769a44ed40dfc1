"""The scores of single classes, for the eye: sorted, in percent, without classes that do not occur."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from internseg_ds.monitoring.units import in_percent
from internseg_ds.output_files import whole_file

EXTREMES = 3
"""Classes that are named as the best and as the worst."""


def is_of_one_class(metric: str) -> bool:
    """Whether mmseg's name of a score is that of one class (IoU.wall), and not of all (mIoU)."""
    return "." in metric


def absent_classes(confusion: Tensor) -> list[int]:
    """Classes that no labelled pixel has. confusion: as of `Evaluation.confusion`."""
    return (confusion[:-1].sum(1) == 0).nonzero().flatten().tolist()


def class_scores(
    metrics: Mapping[str, float], confusion: Tensor, classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """By class, from the best to the worst by the first score: its scores, in percent. Classes without a labelled
    pixel are left out. metrics, confusion: as of `Evaluation`."""
    absent = {classes[index] for index in absent_classes(confusion)}
    found: dict[str, dict[str, float]] = {}
    for key, value in in_percent(metrics).items():
        score, _, name = key.partition(".")
        if is_of_one_class(key) and name in classes and name not in absent and not score[0].isdigit():
            found.setdefault(name, {})[score] = value
    return dict(sorted(found.items(), key=lambda item: -next(iter(item[1].values()))))


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """scores: as of `class_scores`. Lines of text."""
    names = list(dict.fromkeys(name for of_class in scores.values() for name in of_class))
    lines = {name: " ".join(name.split()) for name in scores}
    width = max(map(len, (*lines.values(), "class")))
    head = f"{'class':<{width}}" + "".join(f"{f'{name} %':>12}" for name in names)
    rows = [
        f"{lines[name]:<{width}}"
        + "".join(f"{of_class[each]:12.2f}" if each in of_class else " " * 12 for each in names)
        for name, of_class in scores.items()
    ]
    return "\n".join([head, *rows])


def extremes(scores: Mapping[str, Mapping[str, float]]) -> str:
    """ "IoU: best sky 97.10 %, ...; worst bag 12.30 %, ..."; every class where there are few."""
    ordered = [(name, next(iter(of_class.items()))) for name, of_class in scores.items()]
    if not ordered:
        return ""
    said = [f"{' '.join(name.split())} {value:.2f} %" for name, (_, value) in ordered]
    score = ordered[0][1][0]
    if len(said) <= 2 * EXTREMES:
        return f"{score}: {', '.join(said)}"
    return f"{score}: best {', '.join(said[:EXTREMES])}; worst {', '.join(said[: -EXTREMES - 1 : -1])}"


def write_class_scores(scores: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """CSV with a row for each class of `class_scores`. Raises OutputError."""
    names = list(dict.fromkeys(name for of_class in scores.values() for name in of_class))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["class", *(f"{name} %" for name in names)])
    for name, of_class in scores.items():
        writer.writerow([name, *(f"{of_class[each]:.2f}" if each in of_class else "" for each in names)])
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
