"""What plain models of transformers and those of stages have in common: how they are built, and what is read
of their configuration."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def undrawn(kind: Any, config: Any) -> nn.Module:
    """The module, whose values are undefined: transformers would draw them while ZeRO-3 partitions them."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return kind(config)


def names_of(model: nn.Module) -> list[str]:
    """Its parameters and buffers, those that files do not hold included."""
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


def map_indices(config: Any, chosen: Sequence[int], count: int) -> list[int]:
    """The numbers of the `chosen` of `count` maps in transformers' backbone class: those of a model whose stem
    is one of them begin at 1. Empty where there is no such class."""
    stages = getattr(config, "stage_names", None)
    return [index + len(stages) - count for index in chosen] if stages else []


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def other_size(model: str, size: tuple[int, int], image: Tensor) -> ValueError:
    return ValueError(
        f"this {model} takes images of {size[0]} x {size[1]} pixels alone, not of {image.size(2)} x {image.size(3)}; "
        "write config=dict(image_size=...) for the size of the crops, and test in windows of the same size"
    )
