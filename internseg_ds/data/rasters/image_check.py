"""Whether an image has what the later steps of its pipeline take: so many channels, 8 bits.

In: the transforms of a pipeline. Out: the same with a `CheckImage` behind the step that loads; ConfigErrors of what
the settings alone show.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from mmseg.datasets.pipelines import LoadImageFromFile, Normalize

from internseg_ds.data.checks.pipeline_steps import TAKE_8_BITS, flat
from internseg_ds.data.rasters.loading import LoadRaster
from internseg_ds.errors import DataError, counted


class CheckImage:
    """Raises DataError, naming the file, for an image that the steps behind it cannot take.

    channels: numbers in the mean of Normalize; None: any. takes_8_bits: the name of a step that takes 8-bit images
    alone, of three channels where it is PhotoMetricDistortion; None: there is none.
    """

    def __init__(self, channels: int | None, takes_8_bits: str | None) -> None:
        self.channels, self.takes_8_bits = channels, takes_8_bits

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image, file = results["img"], results.get("filename", "an image")
        channels = 1 if image.ndim < 3 else image.shape[2]
        has = f"image {file} has {counted(channels, 'channel')} of {image.dtype}"
        if self.channels not in (None, channels):
            raise DataError(
                f"{has}, and Normalize has mean and std of {self.channels}: write one number for each channel "
                "(and as many channels into the backbone), or choose channels=[...] of LoadRaster"
            )
        colour = self.takes_8_bits == "PhotoMetricDistortion"
        if self.takes_8_bits and (_is_wide(image) or (colour and channels != 3)):
            raise DataError(
                f"{has}, and {self.takes_8_bits} is of 8-bit images{' of three channels' * colour}; take it out of the "
                "pipeline"
            )
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(channels={self.channels})"


def check_images_of(steps: list[Any]) -> None:
    """Has each image that mmseg's loader, or ours, reads looked at (`CheckImage`), in a pipeline's list of steps."""
    place = next(
        (place for place, step in enumerate(steps) if isinstance(step, (LoadImageFromFile, LoadRaster))), None
    )
    if place is None or any(isinstance(step, CheckImage) for step in steps):
        return
    behind = list(flat(steps[place + 1 :]))
    eight_bits = next((type(step).__name__ for step in behind if type(step).__name__ in TAKE_8_BITS), None)
    steps.insert(place + 1, CheckImage(normalized_channels(behind), eight_bits))


def normalized_channels(steps: Iterable[Any]) -> int | None:
    """Channels that the first Normalize of some steps has numbers for; None where there is none, or one number for
    all."""
    for step in flat(steps):
        if isinstance(step, Normalize):
            return int(step.mean.size) if step.mean.size > 1 else None
    return None


def _is_wide(image: np.ndarray) -> bool:
    """Whether an image has more than 8 bits a value. float32 may be 8-bit values (`to_float32`)."""
    return image.dtype != np.uint8 and (image.dtype != np.float32 or image.max(initial=0) > 255)
