"""What the engine reads of a segmentor's backbone beside its forward, and what it does where a backbone says nothing.

Any module of mmseg's BACKBONES registry trains as it is. What differs between backbones is said by the backbone's own attributes, listed in `Backbone`;
nothing above this package knows one by name. docs/adding_a_backbone.md goes through them with an example.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from internseg_ds.models.recomputation import Recomputation


class Backbone(Protocol):
    """Every attribute and method, none of which a backbone must have; below each, what it is for, and what happens without it."""

    patch_size: int | tuple[int, int]
    """Pixels whose multiples the sides of an image must be: crops are checked before a run, evaluated images padded. Without: images of any size."""
    follows_dtype: bool
    """Whether all of it computes in the dtype of its input. Without: in bf16 it runs under torch.autocast, which brings together what it mixes
    (a mask or a grid that is made in fp32), and has its layer norms and softmaxes in fp32."""
    with_cp: bool
    recomputation: Recomputation
    """What `run_block` (models/recomputation.py) is to keep of a block, where `with_cp` is true. Without: `engine.recomputation` must be "auto" or "config"."""
    depth: int
    """Layers, for layer-wise learning-rate decay. With `layer_id` only."""
    depths: tuple[int, ...]
    """Layers of each level; `paramwise_cfg.depths` must repeat it. Without: a config that has `paramwise_cfg.depths` is refused."""
    no_decay_words: tuple[str, ...]
    """Under layer-wise decay, parameters whose names hold one of these get no weight decay. Without: only vectors and biases get none."""
    pretrained: str | None
    """The weight file that the engine loads before the first step. Without: the checkpoint of mmcv's init_cfg=dict(type="Pretrained", checkpoint=PATH)."""
    pretrained_extras: tuple[str, ...]
    """Prefixes of names that weight files hold beside the backbone, other than those of the usual classifiers (fc., head., classifier., ...)."""
    not_pretrained: tuple[str, ...]
    """Prefixes of names that weight files lack; they keep their initial values. Without: a missing name is an error."""
    resizable: Mapping[
        str, tuple[Callable[[torch.Size, torch.Size], bool], Callable[[Tensor, torch.Size], Tensor]]
    ]
    """Parameters whose shape in a file may differ: whether (the file's, the model's) shapes can be brought together, and how.
    Without: a difference is an error."""
    arguments: Mapping[str, Any]
    """The constructor arguments that `arguments_of` is held against."""

    layouts: tuple[str, ...]
    """The published layouts that `exported` knows. With `exported` only."""

    def layer_id(self, name: str) -> int:
        """The layer of a parameter, 0 to depth + 1; name is relative to the backbone. Without: layer-wise decay is refused, and all layers learn alike."""

    def is_offset(self, name: str) -> bool:
        """Whether `paramwise_cfg.offset_lr_scale` scales this parameter's learning rate. Without: a scale other than 1 is refused."""

    @staticmethod
    def published_sources(names: Collection[str]) -> tuple[str, dict[str, tuple[str, ...]]] | None:
        """How a file with these names holds the backbone: (prefix of its names, ours -> theirs; several of theirs are joined along the first dimension).

        None, or no such method: by the backbone's own names.
        """

    @staticmethod
    def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that a folder's config.json asks for; a run whose backbone has others is refused. Without: the shapes alone must fit."""

    def exported(self, layout: str) -> tuple[dict[str, tuple[str, ...]], dict[str, Any] | None]:
        """ours -> theirs in a published layout, and its config.json or None. Without: consolidate.py --backbone is refused."""


def patch_size(backbone: nn.Module) -> int:
    """Pixels whose multiples the height and width of its images must be."""
    size = getattr(backbone, "patch_size", 1)
    return math.lcm(*size) if isinstance(size, (list, tuple)) else size


def vector_length(backbone: nn.Module) -> int:
    """The commonest length of its 1-d parameters: the width of its blocks, whatever they call it. 1024 where there are none."""
    lengths = Counter(param.numel() for param in backbone.parameters() if param.dim() == 1)
    return max(lengths, key=lambda length: (lengths[length], length), default=1024)


def pretrained_file(backbone: nn.Module) -> Any:
    """Its `pretrained`, or the checkpoint of its `init_cfg`, which is the same in mmseg; None for initial values."""
    pretrained = getattr(backbone, "pretrained", None)
    return checkpoint_of(getattr(backbone, "init_cfg", None)) if pretrained is None else pretrained


def forget_pretrained(segmentor: nn.Module) -> None:
    """Takes mmcv's Pretrained out of every init_cfg: its modules would each read the whole file on each rank, and pass over names that do not fit."""
    for module in segmentor.modules():
        if checkpoint_of(getattr(module, "init_cfg", None)) is not None:
            module.init_cfg = None


def pretrained_elsewhere(segmentor: nn.Module) -> list[str]:
    """Names of the modules whose init_cfg asks for weights of their own, other than the backbone; "" is the segmentor."""
    return [
        name
        for name, module in segmentor.named_modules()
        if name != "backbone" and checkpoint_of(getattr(module, "init_cfg", None)) is not None
    ]


def checkpoint_of(init_cfg: Any) -> Any:
    """The checkpoint of mmcv's Pretrained in an init_cfg, which may be a list; None where there is none."""
    return next(
        (
            entry.get("checkpoint")
            for entry in (init_cfg if isinstance(init_cfg, list) else [init_cfg])
            if isinstance(entry, Mapping) and entry.get("type") == "Pretrained"
        ),
        None,
    )
