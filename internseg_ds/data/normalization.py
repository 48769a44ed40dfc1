"""Whether images are normalised by numbers that can be meant, and alike where a model is trained and where it is scored."""

import math
from collections.abc import Iterable
from typing import Any

from mmseg.datasets.pipelines import Normalize
from torch.utils.data import Dataset

from internseg_ds.data.datasets import pipelines
from internseg_ds.data.pipeline_steps import flat
from internseg_ds.errors import ConfigError


def check_normalization(dataset: Dataset, what: str) -> None:
    """Each Normalize must divide by numbers above 0. Raises ConfigError. what: the data set's name in messages ("data.train")."""
    for steps in pipelines(dataset):
        for step in flat(steps):
            if isinstance(step, Normalize) and not all(
                0 < value < math.inf for value in map(float, step.std)
            ):
                raise ConfigError(
                    f"std={step.std.tolist()} of Normalize in the pipeline of {what}: each number must be above 0, "
                    "for values are divided by it; write 1.0 to leave them as they are"
                )


def compare_normalization(train_set: Dataset, val_set: Dataset) -> list[str]:
    """A warning where an evaluation normalises its images as no training image is."""
    trained = {_settings(steps) for steps in pipelines(train_set)}
    scored = {_settings(steps) for steps in pipelines(val_set)}
    return [
        f"images of data.val are normalised {_words(other)}, those of data.train {' or '.join(map(_words, sorted(trained, key=str)))}; give the Normalize "
        "of both pipelines the same mean, std and to_rgb"
        for other in sorted(scored - trained, key=str)
    ]


def _settings(steps: Iterable[Any]) -> tuple[Any, ...] | None:
    """mean, std and to_rgb of the last Normalize of a pipeline."""
    found = [
        (tuple(map(float, step.mean)), tuple(map(float, step.std)), bool(step.to_rgb))
        for step in flat(steps)
        if isinstance(step, Normalize)
    ]
    return found[-1] if found else None


def _words(settings: tuple[Any, ...] | None) -> str:
    if settings is None:
        return "by no Normalize"
    mean, std, to_rgb = settings
    return f"with mean={[round(value, 3) for value in mean]}, std={[round(value, 3) for value in std]}, to_rgb={to_rgb}"
