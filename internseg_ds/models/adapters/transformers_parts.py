"""What plain models of transformers and those of stages have in common: how they are built, and what is read
of their configuration."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from internseg_ds.models.derived_class import derived_class


def undrawn(kind: Any, config: Any) -> nn.Module:
    """The module, whose values are undefined: transformers would draw them while ZeRO-3 partitions them."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return kind(config)


def without_empty_register_tokens(model: Any) -> None:
    """Gives a model that has no register tokens, by its configuration, no parameter for them: transformers makes
    one without elements, which gets no gradient, and which ZeRO-3 cannot gather."""
    if getattr(model.config, "num_register_tokens", None) != 0:
        return
    for module in model.modules():
        if any(name == "register_tokens" for name, _ in module.named_parameters(recurse=False)):
            del module.register_tokens
            module.__class__ = derived_class(type(module), {"register_tokens": property(_no_register_tokens)})


def _no_register_tokens(embeddings: Any) -> Tensor:
    """(1, 0, c), as the class token's (1, 1, c) in dtype and device."""
    token: Tensor = embeddings.cls_token
    return token.new_empty(1, 0, embeddings.config.hidden_size)


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
