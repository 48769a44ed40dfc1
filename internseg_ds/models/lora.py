"""Low-rank adapters (LoRA) in the linear layers of a backbone's repeated blocks, made by `peft`.

y = W x + (alpha / rank) B A x with W frozen, A (rank, in) and B (out, rank), which starts as zeros: training
begins at the pretrained model. Source: Hu et al., "LoRA" (2021), section 4.1. In peft's module tree a layer
`qkv` becomes `qkv.base_layer`, and beside it lie `qkv.lora_A.default` and `qkv.lora_B.default`; the names of
weight files stay those without adapters (`lora_names`). Works on models on the meta device too.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from internseg_ds.models.repeated_blocks import repeated_blocks


@dataclass(frozen=True)
class Lora:
    """rank: of B A. alpha: the adapter's output is scaled by alpha / rank. dropout: of the adapter's input, a
    probability. targets: endings of the names of the layers that get one; None: all linear layers of the
    repeated blocks that their blocks call."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


def adapters(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", ()) and hasattr(module, "base_layer")
    }


def target_names(backbone: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """The names of the layers of `backbone` that get an adapter.

    targets: as of `Lora`. Raises ValueError where a target is the ending of no linear layer's name in the
    repeated blocks, or there is no such layer.
    """
    blocks = set(repeated_blocks(backbone))
    if not blocks:
        raise ValueError(f"backbone {type(backbone).__name__} repeats no block that could have adapters")
    layers = {
        f"{block_name}.{name}": called
        for block_name, block in backbone.named_modules()
        if block in blocks
        for name, called in _linear_layers(block)
    }
    endings = sorted({name for block in blocks for name, _ in _linear_layers(block)})
    if targets is None:
        names = [name for name, called in layers.items() if called]
        if not names:
            kind = type(next(iter(blocks))).__name__
            raise ValueError(f"the blocks of {type(backbone).__name__} ({kind}) call no linear layers")
        return names
    for target in targets:
        if not any(_ends(name, target) for name in layers):
            raise ValueError(
                f"targets: {target!r} is the end of no linear layer's name; the blocks of "
                f"{type(backbone).__name__} have {', '.join(endings) or 'none'}"
            )
    return [name for name in layers if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linear_layers(block: nn.Module) -> Iterator[tuple[str, bool]]:
    """Names in `block` of its linear layers, and whether they are called: some modules read the weight of a
    layer inside them and multiply by it themselves, which passes an adapter by."""
    for parent_name, parent in block.named_modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                yield (
                    f"{parent_name}.{name}" if parent_name else name,
                    not _reads_weight(parent, name),
                )


def _reads_weight(parent: nn.Module, name: str) -> bool:
    """torch's attention gives the weights of its projection to a function; that of BEiT and of its
    descendants, which has a bias for queries and values alone, does the same with `qkv`."""
    if isinstance(parent, nn.MultiheadAttention):
        return True
    return name == "qkv" and isinstance(getattr(parent, "q_bias", None), nn.Parameter)


def add_adapters(backbone: nn.Module, lora: Lora) -> None:
    """Give the layers that `lora` names adapters. Of the backbone's parameters theirs alone train afterwards.

    The values of A and B are drawn by `reset_adapter`. Raises ValueError where `target_names` does, for a rank
    that no matrix of these layers can have, and where peft is not installed.
    """
    names = target_names(backbone, lora.targets)
    _check_rank(backbone, names, lora.rank)
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise ValueError(
            "adapters are made by peft, which is not installed; pip install 'internseg_ds[lora]'"
        ) from None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # a pattern of whole names: as a list they would be endings, and find layers outside of the blocks
        target_modules="|".join(map(re.escape, names)),
        bias="none",
        init_lora_weights=False,
    )
    _inject(backbone, config)


def _check_rank(backbone: nn.Module, names: Sequence[str], rank: int) -> None:
    """Raises ValueError for a rank above that of the largest of these layers' weights: B A has no more, and more
    parameters."""
    sides: Any = [(backbone.get_submodule(name), name) for name in names]
    largest, name = max((min(layer.in_features, layer.out_features), name) for layer, name in sides)
    if rank > largest:
        raise ValueError(
            f"rank={rank} is more than any of these layers' weights can have, which is {largest} at most "
            f"({name}); take a smaller one, such as 16"
        )


def add_same_adapters(backbone: nn.Module, adapted: nn.Module) -> None:
    """Give `backbone` the adapters that `adapted`, another one of its kind, has; none where it has none."""
    config = getattr(adapted, "peft_config", None)
    if config is not None:
        _inject(backbone, config["default"])


def _inject(backbone: nn.Module, config: Any) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(copy.deepcopy(config), backbone)


@torch.no_grad()
def reset_adapter(layer: Any) -> None:
    """Draw A as a linear layer's weight and set B to zeros, as peft does by default. The parameters are
    whole."""
    layer.lora_A["default"].reset_parameters()
    nn.init.zeros_(layer.lora_B["default"].weight)
