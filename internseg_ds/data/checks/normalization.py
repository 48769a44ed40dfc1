"""Whether images are normalised alike where a model is trained and where it is scored."""

from collections.abc import Iterable
from typing import Any

from mmseg.datasets.pipelines import Normalize

from internseg_ds.data.checks.pipeline_steps import flat
from internseg_ds.data.datasets import SegmentationDataset, pipelines


def compare_normalization(train_set: SegmentationDataset, val_set: SegmentationDataset) -> list[str]:
    """A warning where an evaluation normalises its images as no training image is."""
    trained = {_settings(steps) for steps in pipelines(train_set)}
    scored = {_settings(steps) for steps in pipelines(val_set)}
    return [
        f"images of data.val are normalised {_words(other)}, those of data.train "
        f"{' or '.join(map(_words, sorted(trained, key=str)))}; give the Normalize "
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
    return (
        f"with mean={[round(value, 3) for value in mean]}, "
        f"std={[round(value, 3) for value in std]}, to_rgb={to_rgb}"
    )
