"""Whether the losses of mmseg's heads fit their classes, each other and the labels. What does not would end a
run at its first step, at the first image with a border, or not at all.

In: the segmentor on the meta device, and the training set. Out: lines for the log, or a ConfigError that
names the setting and what to change.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss, DiceLoss, FocalLoss, LovaszLoss, TverskyLoss
from torch import nn

from internseg_ds.data.entries import steps_of
from internseg_ds.errors import ConfigError, counted, short_repr
from internseg_ds.models.heads import losses_of
from internseg_ds.models.pixel_losses import BinaryCrossEntropyOfAnyImages, LovaszOfAnyImages

FILLED = {
    "Pad": ("seg_pad_val", 255),
    "RandomRotate": ("seg_pad_val", 255),
    "RandomMosaic": ("seg_pad_val", 255),
    "RandomCutOut": ("seg_fill_in", None),
}
"""The transforms of mmseg that make pixels of the label map, the argument that says of what label, and its
default."""

USUAL = 255
"""The label for "no class" wherever nobody says otherwise: with more classes, a default that was left, and no
class that is meant."""
LOSSES = (
    CrossEntropyLoss,
    BinaryCrossEntropyOfAnyImages,
    FocalLoss,
    LovaszLoss,
    LovaszOfAnyImages,
    DiceLoss,
    TverskyLoss,
)
"""Those whose `class_weight` is one number for each class. That of somebody's own loss may be anything."""


def check_losses(model: nn.Module, train: Any, ignored: Sequence[int], path: str) -> list[str]:
    """Lines about losses that do not count. train: the config's `data.train`; ignored: the `ignore_index` of
    its data sets. Raises ConfigError."""
    lines: list[str] = []
    for name, head in model.named_modules():
        if isinstance(head, BaseDecodeHead) and hasattr(head, "loss_decode"):
            losses = losses_of(head)
            for loss in losses:
                _check_weights(f"model.{name}.loss_decode", loss, head.out_channels)
                _check_one_class(f"model.{name}", head.num_classes)
                _check_one_channel(f"model.{name}", loss, head.out_channels)
            lines += _that_do_not_count(
                f"model.{name}.loss_decode", [getattr(loss, "loss_name", "loss") for loss in losses]
            )
            made = [(f"ignore_index of data.train is {value}", value) for value in ignored]
            made += [
                (f"{step}.{argument} of its pipeline is {value}", value)
                for step, argument, value in filled_labels(train)
            ]
            lines += _check_ignored(f"model.{name}", head, losses, dict.fromkeys(made), path)
    return lines


def _check_weights(what: str, loss: nn.Module, channels: int) -> None:
    weights = getattr(loss, "class_weight", None)
    if weights is None or type(loss) not in LOSSES:
        return
    if isinstance(loss, CrossEntropyLoss) and loss.use_sigmoid and len(weights) > 1:
        raise ConfigError(
            f"{what} has class_weight with use_sigmoid=True, which mmseg would lay along the width of the "
            "image and not over the classes; "
            "leave class_weight out, or use_sigmoid"
        )
    if any(not 0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError(
            f"{what}: class_weight of {type(loss).__name__} must be numbers of at least 0, and not all 0; "
            f"it is {short_repr(list(weights))}"
        )
    if len(weights) != channels and not (isinstance(loss, LovaszLoss) and channels == 1):
        raise ConfigError(
            f"{what}: {type(loss).__name__} has class_weight of {len(weights)} numbers, and the head "
            f"predicts {counted(channels, 'class')}; "
            "give one number for each class"
        )


def _check_one_class(what: str, classes: int) -> None:
    if classes == 1:
        raise ConfigError(
            f"{what}.num_classes=1: a single class cannot be told from any other, and mmseg scores a sigmoid's "
            "answer as class 1, which there is not; write num_classes=2, one for all else"
        )


def _check_one_channel(what: str, loss: nn.Module, channels: int) -> None:
    softmax = (
        (isinstance(loss, CrossEntropyLoss) and not loss.use_sigmoid)
        or isinstance(loss, (DiceLoss, FocalLoss, TverskyLoss))
        or (isinstance(loss, LovaszLoss) and "softmax" in loss.cls_criterion.__name__)
    )
    if channels == 1 and softmax:
        raise ConfigError(
            f"{what} has one output channel, and {type(loss).__name__} as it is set compares channels with "
            "each other, so nothing would be "
            "learnt; "
            "write loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True), or num_classes=2 without "
            "out_channels=1"
        )


def _that_do_not_count(what: str, names: Sequence[str]) -> Iterator[str]:
    left_out = [name for name in names if "loss" not in name]
    if left_out and len(left_out) == len(names):
        raise ConfigError(
            f"{what}: loss_name={left_out[0]!r} has no 'loss' in it, so mmseg leaves it out of the sum, "
            "and nothing would train this head; "
            f"call it 'loss_{left_out[0]}'"
        )
    for name in left_out:
        yield (
            f"{what}: loss_name={name!r} has no 'loss' in it, so it is logged and not trained "
            f"on; 'loss_{name}' would be"
        )


def _check_ignored(
    what: str, head: Any, losses: Sequence[nn.Module], made: Iterable[tuple[str, int]], path: str
) -> Iterator[str]:
    """Labels that are no class must be those that the head ignores; a line where they are one of its classes,
    as padding may be meant to be.

    made: where such labels come from, and what they are.
    """
    for source, value in made:
        if value == head.ignore_index:
            continue
        if value == USUAL or not 0 <= value < head.num_classes:
            trained = (
                f"is class {value} of" if 0 <= value < head.num_classes else "is neither ignored nor one of"
            )
            raise ConfigError(
                f"{what}.ignore_index is {head.ignore_index} and {source} (of {path}): a pixel of that "
                f"label {trained} the "
                f"{counted(head.num_classes, 'class')}; make both the same, "
                f"ignore_index={max(value, head.ignore_index)} of each head, say"
            )
        yield f"{source}, which {what} learns as class {value}, since its ignore_index is {head.ignore_index}"
    for loss in losses:
        own = getattr(loss, "ignore_index", None)
        if (
            isinstance(own, int)
            and own != head.ignore_index
            and (own == USUAL or not 0 <= own < head.num_classes)
        ):
            raise ConfigError(
                f"{what}.ignore_index is {head.ignore_index} and that of its {type(loss).__name__} is "
                f"{own}; make them the same"
            )


def filled_labels(entry: Any) -> Iterator[tuple[str, str, int]]:
    """(type, argument, label) of each transform of an entry that makes pixels of the label map."""
    for step in steps_of(entry):
        argument, default = FILLED.get(step.get("type", ""), ("", None))
        if argument and (value := step.get(argument, default)) is not None:
            yield step["type"], argument, value
