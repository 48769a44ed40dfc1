"""What a file says of itself, so that somebody without this package can use it: classes and colours, what the images
are, and how the evaluation went over them.

In: an `Experiment` and the metadata of its weights. Out: text by name, each value a JSON text but for words.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from internseg_ds.config.experiment import Experiment
from internseg_ds.evaluation.deployment.graph import Input
from internseg_ds.evaluation.preprocessor import LARGEST, preprocessor_config
from internseg_ds.version import VERSION

NEUTRAL = ([0.0] * 3, [1.0] * 3)
"""Mean and deviation where the pipeline does not normalise."""


def normalization(experiment: Experiment) -> tuple[list[float], list[float], bool]:
    """Mean and standard deviation of pixels from 0 to 255, in the order in which the segmentor takes the channels, and
    whether that is BGR."""
    config = preprocessor_config(experiment, "", splits=False)
    mean, std = (
        [value * LARGEST for value in config.get(name, default)]
        for name, default in zip(("image_mean", "image_std"), NEUTRAL, strict=True)
    )
    bgr = config.get("channels") == "BGR"
    return (mean[::-1], std[::-1], True) if bgr else (mean, std, False)


def described(
    experiment: Experiment, classes: Sequence[str], palette: Sequence[Any], given: Input, outputs: int
) -> dict[str, str]:
    """The entries of a file. outputs: of the segmentor."""
    processing = preprocessor_config(experiment, "", splits=False)
    mean, std, bgr = normalization(experiment)
    order = slice(None, None, -1) if bgr else slice(None)
    values: Mapping[str, Any] = {
        "classes": [str(name) for name in classes],
        "palette": [list(map(int, colour)) for colour in palette],
        "mean": mean[order],
        "std": std[order],
        "resize": processing.get("size"),
        "windows": processing["windows"],
        "size_multiple": given.multiple if given.dynamic == "size" else None,
    }
    return {
        "input": "image (b, 3, h, w) float32, RGB from 0 to 255; it is normalised inside, with mean and std",
        "output": "logits (b, outputs, h, w) float32, "
        + (
            "one per pixel: class 1 where its sigmoid is above the threshold"
            if outputs == 1
            else "largest wins"
        ),
        "written_by": f"internseg_ds {VERSION}",
        **{name: json.dumps(value) for name, value in values.items()},
    }
