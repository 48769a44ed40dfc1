"""Which parameters of a segmentor's backbone train, as `engine.tune` asks for: all of them, none, those of the
last blocks, or low-rank adapters (`models/lora.py`).

Necks and heads always train, also a neck inside the backbone's class: what weight files of the backbone lack
(`not_pretrained` of `Backbone`). Decided on a whole model or one on the meta device (`tune`); a model that
ZeRO-3 has partitioned, whose parameters have lost their shapes, follows that one (`tune_like`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from internseg_ds.lora_names import is_factor
from internseg_ds.models.freezing import keep_in_eval
from internseg_ds.models.lora import Lora, add_adapters, add_same_adapters, target_names
from internseg_ds.models.repeated_blocks import repeated_blocks


@dataclass(frozen=True)
class LastBlocks:
    """The last `count` of the backbone's repeated blocks train, and what it defines behind the first of
    them: norms, downsampling layers."""

    count: int


TuningMode = Literal["all", "head"] | LastBlocks | Lora
"""all: every parameter that the backbone itself trains. head: none of the backbone's own."""


def tune(segmentor: nn.Module, mode: TuningMode) -> None:
    """Choose which parameters of `segmentor.backbone` train, and add the adapters of a `Lora`.

    What does not train runs as in an evaluation: its norms keep their statistics. Blocks in front of the
    first trained parameter keep nothing for the backward pass. Raises ValueError for more blocks than the
    backbone has, layers that it does not have, and parameters that the backbone freezes itself.
    """
    if mode == "all":
        return
    backbone = segmentor.get_submodule("backbone")
    trained = {name for name in _own_of_neck(backbone) if backbone.get_parameter(name).requires_grad}
    if isinstance(mode, LastBlocks):
        trained |= _behind(backbone, mode.count)
    elif isinstance(mode, Lora):
        _refuse_frozen(
            backbone, [f"{layer}.weight" for layer in target_names(backbone, mode.targets)], "adapters in"
        )
        add_adapters(backbone, mode)
        trained |= {name for name, _ in backbone.named_parameters() if is_factor(name)}
    _train_only(backbone, trained, repeated_blocks(backbone))


def tune_like(segmentor: nn.Module, tuned: nn.Module) -> None:
    """Give `segmentor`, which ZeRO-3 may have partitioned, the adapters of `tuned`, a segmentor of the same
    config on the meta device, and train the same parameters of its backbone."""
    backbone, other = segmentor.get_submodule("backbone"), tuned.get_submodule("backbone")
    add_same_adapters(backbone, other)
    blocks = set(repeated_blocks(other))
    _train_only(
        backbone,
        {name for name, param in other.named_parameters() if param.requires_grad},
        [backbone.get_submodule(name) for name, module in other.named_modules() if module in blocks],
    )


def _own_of_neck(backbone: nn.Module) -> list[str]:
    """Names of the parameters that no weight file of the backbone has."""
    lacking: Any = getattr(backbone, "not_pretrained", ())
    return [name for name, _ in backbone.named_parameters() if name.startswith(tuple(lacking))]


def _behind(backbone: nn.Module, count: int) -> set[str]:
    """Names of the parameters of the last `count` blocks, and of what follows them."""
    blocks = repeated_blocks(backbone)
    kind = type(backbone).__name__
    if not blocks:
        raise ValueError(f"backbone {kind} repeats no block, so it has no last ones")
    if count > len(blocks):
        raise ValueError(f"last_blocks={count} is more than the {len(blocks)} blocks of {kind}")
    of_blocks = {param for block in blocks[-count:] for param in block.parameters()}
    names = [name for name, _ in backbone.named_parameters()]
    first = next(index for index, (_, param) in enumerate(backbone.named_parameters()) if param in of_blocks)
    _refuse_frozen(
        backbone, [name for name, param in backbone.named_parameters() if param in of_blocks], "training"
    )
    return {name for name in names[first:] if backbone.get_parameter(name).requires_grad}


def _refuse_frozen(backbone: nn.Module, names: Iterable[str], doing: str) -> None:
    """Raise ValueError where the backbone freezes one of these parameters by a setting of its own."""
    for name in names:
        if not backbone.get_parameter(name).requires_grad:
            raise ValueError(
                f"{doing} {name} contradicts a setting of model.backbone that freezes it (freeze, freeze_vit, "
                "frozen_stages); drop one of the two"
            )


def _train_only(backbone: nn.Module, trained: Collection[str], blocks: Collection[nn.Module]) -> None:
    for name, param in backbone.named_parameters():
        param.requires_grad_(name in trained)
    keep_in_eval(backbone, blocks)
