"""What a segmentor is as a folder of transformers: the class that loads it, its configuration, and the names of its
weights there.

In: a segmentor of mmseg, on the meta device. Out: a `SegmentorFormat`; no value of a weight is read here. That
names and shapes are those of the class is asked of the class itself, built on the meta device.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internseg_ds.models.adapters.transformers_keys import places, published_keys
from internseg_ds.tensor_part import Part

AUXILIARY = "auxiliary_head."
"""Heads of training alone, which no folder holds."""


@dataclass(frozen=True)
class SegmentorFormat:
    """How transformers loads a segmentor."""

    loader: str
    """The class of transformers whose `from_pretrained` takes the folder."""
    processor: str
    """The class of transformers that prepares images."""
    config: dict[str, Any]
    """Of config.json, without what the classes are called."""
    sources: dict[str, tuple[str | Part, ...]]
    """Name in the segmentor -> keys of the folder into which it is split, or the part of a key that it is."""
    unused: tuple[str, ...] = ()
    """Names in the segmentor that no logit depends on, and that the folder lacks."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Keys of the folder that no weight of the segmentor fills."""
    processor_fields: dict[str, Any] = field(default_factory=dict)
    """Of preprocessor_config.json, what this processor needs beside size and normalisation."""
    splits_images: bool = False
    """Whether the processor cuts a resized image into squares, for a class that takes one size alone."""
    code: tuple[Path, ...] = ()
    """Files that the folder brings; where there are none, the class is transformers' own."""


def weight_names(segmentor: nn.Module) -> list[str]:
    """Parameters and buffers that a folder holds."""
    return [name for name in segmentor.state_dict() if not name.startswith(AUXILIARY)]


def format_of(
    segmentor: nn.Module,
    theirs: Any,
    names: Mapping[str, tuple[str | Part, ...]],
    *,
    loader: str,
    processor: str,
    constants: Mapping[str, Tensor] | None = None,
    processor_fields: Mapping[str, Any] | None = None,
    splits_images: bool = False,
    code: tuple[Path, ...] = (),
) -> SegmentorFormat:
    """The format of a segmentor whose weights have these names in `theirs`, a model of transformers on the meta
    device. names: ours -> theirs, into which ours is split along its first dimension, or the part of theirs that it
    is.

    Raises ValueError where `theirs` has other weights than these, or of other shapes.
    """
    own, expected = segmentor.state_dict(), {key: value.shape for key, value in theirs.state_dict().items()}
    found = {
        their.key if isinstance(their, Part) else their: _whole_shape(own[name].shape, len(split), their)
        for name, split in names.items()
        for their in split
    }
    found |= {name: value.shape for name, value in (constants or {}).items()}
    if found != expected:
        differing = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise ValueError(
            f"transformers' {type(theirs).__name__} has other weights than this segmentor: {differing[0]} is "
            f"{_shape(expected.get(differing[0]))} there and {_shape(found.get(differing[0]))} here"
        )
    keys = places(published_keys(theirs, list(expected)))
    config: dict[str, Any] = json.loads(theirs.config.to_json_string())
    return SegmentorFormat(
        loader=loader,
        processor=processor,
        config=config | {"architectures": [type(theirs).__name__]},
        sources={name: tuple(_keyed(their, keys) for their in split) for name, split in names.items()},
        unused=tuple(name for name in weight_names(segmentor) if name not in names),
        constants={str(keys[name][0]): value for name, value in (constants or {}).items()},
        processor_fields=dict(processor_fields or {}),
        splits_images=splits_images,
        code=code,
    )


def _whole_shape(ours: torch.Size, pieces: int, their: str | Part) -> torch.Size:
    """The shape of a tensor of theirs that is one of so many pieces of ours, or of which ours is a part."""
    rows = their.parts if isinstance(their, Part) else 1
    return torch.Size([ours[0] * rows // pieces, *ours[1:]]) if rows != pieces else ours


def _keyed(their: str | Part, keys: Mapping[str, tuple[Any, ...]]) -> str | Part:
    """Where a folder has a tensor of theirs, or part of it, that has a key of its own there."""
    if isinstance(their, Part):
        return Part(str(keys[their.key][0]), their.index, their.parts)
    return keys[their][0]


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"
