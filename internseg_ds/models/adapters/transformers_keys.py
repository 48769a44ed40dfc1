"""The keys of transformers' weight files for the parameters of its models. Names only: no tensor of a file is
read here.

transformers renames the keys of many published files when it loads them, and joins or splits some tensors; it
undoes that when it saves. Which of ours are in which tensor of a published file is asked of its own code, with a
number in the place of each tensor. In files of larger models the keys have a prefix.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from internseg_ds.tensor_part import Part

Keys = Mapping[str, tuple[str, ...]]
"""A key of a file -> the names in the model that it holds, one after the other along the first dimension."""


def published_keys(model: Any, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The keys of the files that `model.save_pretrained` would write, for parameters and buffers of these
    `names`."""
    from transformers.core_model_loading import revert_weight_conversion

    numbers = {name: torch.tensor([number], device="cpu") for number, name in enumerate(names)}
    written: Mapping[str, torch.Tensor] = revert_weight_conversion(model, numbers)
    return {key: tuple(names[number] for number in held.tolist()) for key, held in written.items()}


def sources(
    model: Any, names: Sequence[str], file: Collection[str]
) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """(prefix of the model's keys in a file, name in the model -> where the file has it), of the key layout that
    fits most of the file's keys: published files', the model's own names, or those of the model inside it. Empty
    where none does."""
    present = set(file)
    inner = f"{model.base_model_prefix}."
    own = {name: (name,) for name in names}
    layouts: list[Keys] = [
        published_keys(model, names),
        own,
        {name.removeprefix(inner): (name,) for name in names},
    ]
    best: tuple[str, dict[str, tuple[str, ...]]] = ("", {})
    for layout in layouts:
        for prefix in _prefixes(layout, present):
            found = {prefix + key: held for key, held in layout.items() if prefix + key in present}
            if len(found) > len(best[1]):
                best = (prefix, found)
    prefix, keys = best
    return prefix, places(keys)


def places(keys: Keys) -> dict[str, tuple[Any, ...]]:
    """Name in the model -> the key that holds it, or its part of that tensor."""
    return {
        name: (Part(key, index, len(held)) if len(held) > 1 else key,)
        for key, held in keys.items()
        for index, name in enumerate(held)
    }


def _prefixes(layout: Keys, present: Collection[str]) -> set[str]:
    """What may stand in front of a layout's keys in a file: what stands there in front of the first of them."""
    return {
        name.removesuffix(mark)
        for mark in list(layout)[:3]
        for name in present
        if name == mark or name.endswith(f".{mark}")
    }
