"""Whether what the config says of ignored labels agrees: the label of padding, that which heads ignore, and that which some of their losses ignore.

What does not would end a run at the first image that is smaller than the crop (on a GPU by an assert of the device), or count ignored pixels as a class.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import nn

from internseg_ds.errors import ConfigError

FILLED = {"Pad": ("seg_pad_val", 255), "RandomRotate": ("seg_pad_val", 255), "RandomMosaic": ("seg_pad_val", 255), "RandomCutOut": ("seg_fill_in", None)}
"""The transforms of mmseg that make pixels of the label map, the argument that says of what label, and its default."""


def check_ignored(model: nn.Module, train: Any, path: str) -> None:
    """train: the config's `data.train`. Raises ConfigError where a label is made that is no class and that some head of mmseg's does not ignore."""
    filled = list(_filled(train))
    for name, head in model.named_modules():
        if not isinstance(head, BaseDecodeHead) or not hasattr(head, "loss_decode"):
            continue
        for source, value in filled:
            if value != head.ignore_index and not 0 <= value < head.num_classes:
                raise ConfigError(f"model.{name}.ignore_index is {head.ignore_index} and {source} of data.train of {path} is {value}: a pixel of that label is "
                                  f"neither ignored nor one of {head.num_classes} classes; set {source}={head.ignore_index}, or the ignore_index of each head")
        for loss in head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]:
            own = getattr(loss, "ignore_index", None)
            if isinstance(own, int) and own != head.ignore_index and not 0 <= own < head.num_classes:
                raise ConfigError(f"model.{name}.ignore_index is {head.ignore_index} and that of its {type(loss).__name__} is {own}; make them the same")


def _filled(entry: Any) -> Iterator[tuple[str, int]]:
    """Each transform of an entry that makes pixels of the label map, in wrappers too, and their label."""
    if isinstance(entry, (list, tuple)):
        for part in entry:
            yield from _filled(part)
    elif isinstance(entry, Mapping):
        for step in entry.get("pipeline") or ():
            argument, default = FILLED.get(step.get("type"), (None, None))
            if isinstance(value := step.get(argument, default), int):
                yield f"{step['type']}.{argument}", value
        yield from _filled(entry.get("dataset"))
