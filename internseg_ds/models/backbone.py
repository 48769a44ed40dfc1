"""What the engine reads of a segmentor's backbone beside its forward, and the defaults where a backbone does
not have it.

Any module of mmseg's BACKBONES registry trains as it is. What differs between backbones is stated by the
backbone's own attributes, listed in `Backbone`; no code outside `internseg_ds/models` knows a backbone by
name. docs/adding_a_backbone.md goes through the attributes with an example.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from internseg_ds.models.activation_checkpointing import CheckpointingPolicy
from internseg_ds.tensor_part import Part

CanResize = Callable[[torch.Size, torch.Size], bool]
"""Whether a tensor can be resized: (its shape in the file, the parameter's shape in the model)."""
Resize = Callable[[Tensor, torch.Size], Tensor]
"""Resizes: (the tensor in the file, the parameter's shape in the model) -> a tensor of that shape."""


class Backbone(Protocol):
    """Every attribute and method, all of them optional; below each, what it is for, and what happens
    without it."""

    patch_size: int | tuple[int, int]
    """Pixels whose multiples the sides of an image must be: crops are checked before a run, evaluated images
    padded. Without: images of any size."""
    image_channels: int
    """Channels of its images: images of others are refused before a run. Without: planning takes those of its first
    convolution."""
    follows_dtype: bool
    """Whether all of it computes in the dtype of its input. Without: in bf16 it runs under torch.autocast,
    which converts operands of different dtypes (a mask or a grid that is made in fp32) and computes layer
    norms and softmaxes in fp32."""
    with_cp: bool
    recomputation: CheckpointingPolicy
    """What `run_block` (models/activation_checkpointing.py) keeps of a block, where `with_cp` is true.
    Without: `engine.recomputation` must be "auto" or "config"."""
    depth: int
    """Number of layers, for layer-wise learning-rate decay. With `layer_id` only."""
    depths: tuple[int, ...]
    """Number of layers of each level; `paramwise_cfg.depths` must repeat it. Without: a config that has
    `paramwise_cfg.depths` is an error."""
    no_decay_words: tuple[str, ...]
    """Under layer-wise decay, parameters whose names contain one of these get no weight decay. Without: only
    vectors and biases get none."""
    pretrained: str | None
    """The weight file that the engine loads before the first step. Without: the checkpoint of mmcv's
    init_cfg=dict(type="Pretrained", checkpoint=PATH)."""
    pretrained_extras: tuple[str, ...]
    """Key prefixes that weight files hold beside the backbone, other than those of the usual classifiers
    (fc., head., classifier., ...)."""
    normalizations: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    """Mean and standard deviation, of RGB from 0 to 255, that the images of pretraining were normalised with;
    several where weights of one model differ. Without, or empty: images are not compared with them."""
    left_out: tuple[str, ...]
    """Parameters of a library's model that no feature map depends on and that it was built without, by their
    names there. For a line in the log."""
    not_pretrained: tuple[str, ...]
    """Key prefixes that weight files lack; these parameters keep their initial values, and train under every
    `engine.tune`. Without: a missing key is an error."""
    resizable: Mapping[str, tuple[CanResize, Resize]]
    """Parameters whose shape in a file may differ: whether it can be resized, and how. Without: a
    difference is an error."""
    arguments: Mapping[str, Any]
    """The constructor arguments that `arguments_of` is compared with."""
    stated: Mapping[str, Any]
    """Constructor arguments that saved configs have in place of the config's, so that it can be built where the
    files that those name are gone. Without: those of the config."""
    layouts: tuple[str, ...]
    """The published key layouts that `exported` knows. With `exported` only."""

    def initial_values(self) -> None:
        """Draws the initial values of all its parameters and buffers; each parameter is whole and fp32 while
        a torch function has it. Without: `reset_parameters` of each module, then `init_weights` as mmcv
        has it."""

    def layer_id(self, name: str) -> int:
        """The layer of a parameter, 0 to depth + 1; name is relative to the backbone. Without: layer-wise
        decay is an error, and all layers have the same learning rate."""

    def is_offset(self, name: str) -> bool:
        """Whether `paramwise_cfg.offset_lr_scale` scales this parameter's learning rate. Without: a scale
        other than 1 is an error."""

    @staticmethod
    def published_sources(names: Collection[str]) -> tuple[str, dict[str, tuple[str | Part, ...]]] | None:
        """Where a file with these keys holds the backbone: (prefix of its keys, our name -> their keys, or
        parts of their tensors; several of theirs are concatenated along the first dimension).

        None, or no such method: under the backbone's own names.
        """

    @staticmethod
    def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments that a weight folder's config.json states; a backbone with others is an
        error. Without: only the shapes must match."""

    @staticmethod
    def recognises(names: Collection[str], config: Mapping[str, Any] | None) -> str | None:
        """How a config names this backbone for a weight file with these keys, and this config.json beside
        it (None: there is none); None where the file is in a layout that it does not read. For the error of
        another backbone that was given the file. Without: no error names this backbone."""

    def exported(self, layout: str) -> tuple[dict[str, tuple[str | Part, ...]], dict[str, Any] | None]:
        """Our name -> their keys in a published layout, into which our tensor is split, or the one part of
        theirs that it is; and the layout's config.json or None. Without: consolidate.py --backbone is an
        error."""


def patch_size(backbone: nn.Module) -> int:
    """Pixels whose multiples the height and width of its images must be."""
    size: Any = getattr(backbone, "patch_size", 1)
    return math.lcm(*size) if isinstance(size, (list, tuple)) else size


def stated_channels(backbone: nn.Module) -> int | None:
    """Channels of its images, where the backbone says how many."""
    channels = getattr(backbone, "image_channels", None)
    return channels if isinstance(channels, int) else None


def image_channels(segmentor: nn.Module) -> int:
    """Channels of a segmentor's images: those that its backbone states, or else those of its first convolution; 3
    where it has none."""
    backbone = segmentor.get_submodule("backbone")
    if (stated := stated_channels(backbone)) is not None:
        return stated
    convolutions = (module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    return next((module.in_channels for module in convolutions), 3)


def vector_length(backbone: nn.Module) -> int:
    """The most common length of its 1-d parameters (of several the largest), which is the width of its blocks
    whatever the backbone calls it. 1024 where there are none."""
    lengths = Counter(param.numel() for param in backbone.parameters() if param.dim() == 1)
    return max(lengths, key=lambda length: (lengths[length], length), default=1024)


def pretrained_file(backbone: nn.Module) -> Any:
    """Its `pretrained`, or else the checkpoint of its `init_cfg`, which means the same in mmseg; None for
    initial values."""
    pretrained = getattr(backbone, "pretrained", None)
    return checkpoint_of(getattr(backbone, "init_cfg", None)) if pretrained is None else pretrained


def forget_pretrained(segmentor: nn.Module) -> None:
    """Remove mmcv's Pretrained from every `init_cfg` of a built segmentor.

    mmcv would let each of these modules read the whole file on each rank, and skip keys that do not match.
    The engine loads the file itself.
    """
    modules: Iterator[Any] = segmentor.modules()
    for module in modules:
        if checkpoint_of(getattr(module, "init_cfg", None)) is not None:
            module.init_cfg = None


def pretrained_elsewhere(segmentor: nn.Module) -> list[str]:
    """Names of the modules other than the backbone whose `init_cfg` names weights of their own; "" is the
    segmentor."""
    return [
        name
        for name, module in segmentor.named_modules()
        if name != "backbone" and checkpoint_of(getattr(module, "init_cfg", None)) is not None
    ]


def checkpoint_of(init_cfg: Any) -> Any:
    """The checkpoint of mmcv's Pretrained in an `init_cfg`, which may be a list; None where there is none."""
    for entry in init_cfg if isinstance(init_cfg, list) else [init_cfg]:
        if isinstance(entry, Mapping) and entry.get("type") == "Pretrained":
            return entry.get("checkpoint")
    return None
