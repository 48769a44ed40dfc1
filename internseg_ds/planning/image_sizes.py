"""Sizes of training and evaluated images, read from the pipelines of an experiment."""

from collections.abc import Iterator, Mapping
from typing import Any

from internseg_ds.config.experiment import Experiment
from internseg_ds.data.checks.pipeline_steps import FIX_SIZES
from internseg_ds.data.entries import leaf_datasets, with_inner_steps
from internseg_ds.errors import ConfigError


def crop_size(experiment: Experiment) -> tuple[int, int]:
    """Height and width of the training images, in pixels, from the last step of the pipeline that fixes them.
    Raises ConfigError when none does."""
    train = next(leaf_datasets(experiment.train))
    for step in reversed(train.get("pipeline", ())):
        for key in ("crop_size", "size"):
            size = step.get(key)
            if step.get("type") in FIX_SIZES and isinstance(size, (list, tuple)):
                return size[0], size[1]
    raise ConfigError(
        f"the size of a training image is not known: data.train.pipeline of {experiment.path} has neither "
        "RandomCrop.crop_size nor Pad.size; add one"
    )


def evaluation_size(experiment: Experiment) -> tuple[int, int]:
    """Height and width that an evaluated image may have, from the `img_scale` of its pipeline, or the tiles that
    scenes are cut into; a training crop's where there is neither."""
    scales = [
        scale
        for leaf in leaf_datasets(experiment.val or [])
        for step in with_inner_steps(leaf.get("pipeline", ()))
        for scale in _scales_of_step(step)
    ]
    if not scales:
        return crop_size(experiment)
    largest = max(scales, key=lambda scale: scale[0] * scale[1])
    return min(largest), max(largest)


def _scales_of_step(step: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Every (width, height) that a step may resize an image to.

    `img_scale` is one pair, a list of pairs, or None; `img_ratios` is one factor, or a list of them.
    """
    if isinstance(step.get("tile"), (list, tuple)):
        height, width = step["tile"]
        yield width, height
    scale = step.get("img_scale")
    ratios = step.get("img_ratios") or (1.0,)
    if not isinstance(ratios, (list, tuple)):
        ratios = (ratios,)
    if isinstance(scale, (list, tuple)) and scale and isinstance(scale[0], int):
        scale = [scale]
    for width, height, *_ in scale or ():
        for ratio in ratios:
            yield int(width * ratio), int(height * ratio)
