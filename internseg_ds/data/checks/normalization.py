"""Whether images are normalised alike where a model was pretrained, where it is trained and where it is scored."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from mmseg.datasets.pipelines import Normalize

from internseg_ds.data.checks.pipeline_steps import flat
from internseg_ds.data.dataset_parts import SegmentationDataset, pipelines
from internseg_ds.data.rasters.loading import raster_loader


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


def compare_with_pretraining(
    train_set: SegmentationDataset, pretrained: Collection[tuple[Sequence[float], Sequence[float]]]
) -> list[str]:
    """A warning where training images are normalised as no image of the weights' pretraining was.

    pretrained: mean and standard deviation of each, of RGB from 0 to 255; empty where nothing is known. Rasters,
    whose channels may be anything, are not compared.
    """
    usual = [(tuple(mean), tuple(std), True) for mean, std in pretrained]
    settings_of_rgb = {
        settings
        for steps in pipelines(train_set)
        if raster_loader(steps) is None and ((settings := _settings(steps)) is None or len(settings[0]) == 3)
    }
    odd = {
        settings
        for settings in settings_of_rgb
        if usual and not any(_are_close(settings, each) for each in usual)
    }
    return [
        f"images of data.train are normalised {_words(settings)}, those that the backbone's weights were "
        f"pretrained on {' or '.join(map(_words, usual))}; write that into img_norm_cfg of both pipelines"
        for settings in sorted(odd, key=str)
    ]


def _are_close(settings: tuple[Any, ...] | None, usual: tuple[Any, ...]) -> bool:
    """Within what no feature shows: published values differ in their last digits."""
    return settings is not None and settings[2] == usual[2] and np.allclose(settings[:2], usual[:2], atol=2)


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
