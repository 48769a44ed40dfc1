"""The steps of a pipeline, and whether they, and their order, can be meant.

In: the transforms that mmseg has built. Out: ConfigErrors, and warnings (`odd_steps`). Every pipeline comes
by here, whether it is trained on, evaluated, or predicts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from mmseg.datasets.pipelines import LoadAnnotations, MultiScaleFlipAug, Normalize, RandomFlip

from internseg_ds.errors import ConfigError

CHANGE_LABELS = {
    "Resize",
    "SETR_Resize",
    "ResizeToMultiple",
    "RandomFlip",
    "RandomCrop",
    "RandomRotate",
    "RandomMosaic",
    "RandomCutOut",
    "Pad",
}
"""The transforms of mmseg, and ours, after which the label map is another."""
PACK = {"DefaultFormatBundle", "Collect"}
"""Those after which there is no plain label map any more."""
TAKE_8_BITS = ("PhotoMetricDistortion", "CLAHE", "AdjustGamma")
"""Those that round an image to 0..255."""
READ_RASTERS = ("LoadRaster", "LoadRasterWindow")
"""Those after which an image has the channels of its file, in their order."""
MOVE_PIXELS = ("RandomCrop", "RandomRotate", "RandomMosaic")
"""Those after which predictions do not lie on the image's own pixels."""
CHANGE_IMAGES = ("PhotoMetricDistortion", "RandomCutOut")
"""Those that make another image of the one that is scored, at random."""


def check_steps(steps: Sequence[Any], what: str, *, evaluates: bool) -> None:
    """Raises ConfigError where steps of a pipeline, or their order, cannot be meant. what: the data set's
    name in messages ("data.train"); evaluates: whether it is scored, or predictions are made of it."""
    names = [type(step).__name__ for step in flat(steps)]
    if sum(isinstance(step, LoadAnnotations) for step in steps) > 1:
        raise ConfigError(
            f"the pipeline of {what} has LoadAnnotations twice, so later steps would change its label map "
            "twice; keep one of them"
        )
    _masks_come_last([type(step).__name__ for step in steps], what)
    normalized = names.index("Normalize") if "Normalize" in names else len(names)
    if late := next((name for name in names[normalized:] if name in TAKE_8_BITS), None):
        raise ConfigError(
            f"the pipeline of {what} has {late} behind Normalize, whose values it would round to whole "
            "numbers of 0 to 255; put it before"
        )
    _check_normalization(steps, names, what)
    _check_numbers(steps, what)
    if evaluates:
        _predictions_lie_on_the_image(steps, names, what)


def _check_normalization(steps: Sequence[Any], names: Sequence[str], what: str) -> None:
    """Each Normalize must have a number for each channel, and divide by numbers above 0. Raises
    ConfigError."""
    for step in flat(steps):
        if not isinstance(step, Normalize):
            continue
        _check_channels(step, names, what)
        for name, values in (("mean", step.mean), ("std", step.std)):
            if values.ndim != 1 or not np.isfinite(values).all():
                raise ConfigError(
                    f"{name}={values.tolist()} of Normalize in the pipeline of {what} must be a list of numbers, one "
                    "for each channel"
                )
        if not (step.std > 0).all():
            raise ConfigError(
                f"std={step.std.tolist()} of Normalize in the pipeline of {what}: each number must be "
                "above 0, for values are divided by it; write 1.0 to leave them as they are"
            )


def _check_channels(step: Normalize, names: Sequence[str], what: str) -> None:
    """Steps that OpenCV does for some numbers of channels alone. Raises ConfigError."""
    channels = step.mean.size
    raster = next((name for name in names if name in READ_RASTERS), None)
    if step.std.size != channels:
        raise ConfigError(
            f"Normalize in the pipeline of {what} has {channels} numbers in mean and {step.std.size} in std; write one "
            "of each for each channel"
        )
    if step.to_rgb and (raster or channels not in (1, 3)):
        why = (
            f"{raster} keeps the channels of a file in their order"
            if raster
            else f"{channels} channels are no BGR"
        )
        raise ConfigError(
            f"Normalize in the pipeline of {what} has to_rgb=True, which turns BGR into RGB, but {why}; write "
            "to_rgb=False"
        )
    if channels not in (1, 3) and "PhotoMetricDistortion" in names:
        raise ConfigError(
            f"the pipeline of {what} has PhotoMetricDistortion, which is of 8-bit images of three channels, and "
            f"Normalize has mean and std of {channels}; take it out"
        )


def _check_numbers(steps: Sequence[Any], what: str) -> None:
    """The numbers of mmseg's own transforms must be of the kind that `NUMBERS` says. Raises ConfigError."""
    for step in flat(steps):
        if not type(step).__module__.startswith("mmseg."):
            continue  # somebody's own may mean something else
        for name, (is_right, kind) in NUMBERS.items():
            given = getattr(step, name, None)
            if not all(
                is_right(value) for value in ([given] if is_right is _is_label else _numbers_in(given))
            ):
                raise ConfigError(
                    f"{name}={given!r} of {type(step).__name__} in the pipeline of {what} must be {kind}"
                )


def _numbers_in(given: Any) -> Iterator[Any]:
    """What stands in a setting and in lists in it, but for None."""
    if isinstance(given, (list, tuple)):
        for item in given:
            yield from _numbers_in(item)
    elif given is not None:
        yield given


def _is_size(value: Any) -> bool:
    whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
    return not isinstance(value, bool) and (whole or value == math.inf) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_label(value: Any) -> bool:
    return value is None or (isinstance(value, Integral) and not isinstance(value, bool))


NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "crop_size": (_is_size, "a whole number of pixels, at least 1, for each side"),
    "img_scale": (_is_size, "whole numbers of pixels, at least 1"),
    "size": (_is_size, "a whole number of pixels, at least 1, for each side"),
    "size_divisor": (_is_size, "a whole number of pixels, at least 1"),
    "seg_pad_val": (_is_label, "a whole number, the label of padding"),
    "ignore_index": (_is_label, "a whole number, the label of pixels that do not count"),
    "pad_val": (_is_finite, "a number, or one for each channel"),
    "cat_max_ratio": (lambda value: _is_finite(value) and 0 < value <= 1, "above 0 and at most 1"),
}
"""Settings of mmseg's transforms: what each number of theirs must be, and the words for it."""


def odd_steps(steps: Sequence[Any], what: str, *, evaluates: bool) -> list[str]:
    """Warnings of what a pipeline does that can hardly be meant."""
    names = [type(step).__name__ for step in flat(steps)]
    warnings = []
    if names.count("Normalize") > 1:
        warnings.append(f"the pipeline of {what} has Normalize {names.count('Normalize')} times")
    if evaluates:
        warnings += [
            f"the pipeline of {what} has {name}, so that scores are of images changed at random"
            for name in CHANGE_IMAGES
            if name in names
        ]
    return warnings


def flat(steps: Iterable[Any]) -> Iterator[Any]:
    """The steps of a pipeline, those inside of others (MultiScaleFlipAug) too."""
    for step in steps:
        yield step
        inner = getattr(step, "transforms", None)
        yield from flat(getattr(inner, "transforms", inner) or ())


def _predictions_lie_on_the_image(steps: Sequence[Any], names: Sequence[str], what: str) -> None:
    """An evaluation lays predictions on the original image; it undoes resizing, padding at the end and flips,
    as far as the image's metadata name them."""
    if moving := next((name for name in names if name in MOVE_PIXELS), None):
        raise ConfigError(
            f"the pipeline of {what} has {moving}, after which predictions do not lie on the image that "
            "they are scored against; take it out"
        )
    place = next((place for place, step in enumerate(steps) if isinstance(step, MultiScaleFlipAug)), None)
    if place is None:
        return
    augment = steps[place]
    if augment.flip and not any(isinstance(step, RandomFlip) for step in augment.transforms.transforms):
        raise ConfigError(
            f"the pipeline of {what} has MultiScaleFlipAug(flip=True) without RandomFlip among its "
            "transforms: images stay as they are, "
            "and their predictions would be flipped back; add dict(type='RandomFlip'), or set flip=False"
        )
    if any(isinstance(step, RandomFlip) and step.prob for step in steps[:place]):
        raise ConfigError(
            f"the pipeline of {what} has RandomFlip before MultiScaleFlipAug, which does not know of it, "
            "so predictions would not be "
            "flipped back; put it among the transforms of MultiScaleFlipAug"
        )


def _masks_come_last(steps: Sequence[str], what: str) -> None:
    """Masks are made once, from the label map as it then is: what changes that afterwards would leave them as
    they were. Raises ConfigError."""
    loads = next(
        (place for place, step in enumerate(steps) if step in ("LoadAnnotations", "LoadLabelMap")), 0
    )
    if early := next((step for step in steps[:loads] if step in CHANGE_LABELS), None):
        raise ConfigError(
            f"the pipeline of {what} has {early} before LoadAnnotations, so the label map would not change "
            "with the image; "
            "put LoadAnnotations before it"
        )
    if "ToMask" not in steps:
        return
    place = steps.index("ToMask")
    if changes := next((step for step in steps[place:] if step in CHANGE_LABELS), None):
        raise ConfigError(
            f"the pipeline of {what} has {changes} after ToMask, whose masks would not change with the "
            "image; put ToMask behind it"
        )
    if packed := next((step for step in steps[:place] if step in PACK), None):
        raise ConfigError(
            f"the pipeline of {what} has {packed} before ToMask, which needs the plain label map; put "
            "ToMask before it"
        )
