"""Layer-wise learning-rate decay: mmcv's optimizer constructor `CustomLayerDecayOptimizerConstructor`, as the
segmentation code of InternVL, InternImage and BEiT defines it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mmcv.runner.optimizer import OPTIMIZER_BUILDERS, DefaultOptimizerConstructor
from torch import nn

from internseg_ds.errors import ConfigError, counted, unknown_key
from internseg_ds.lora_names import plain_name
from internseg_ds.zero_partition import full_shape

HEADS_OFFSETS = ("sampling_offsets", "reference_points")
"""Parts of names: the offsets of deformable attention in heads."""


@dataclass(frozen=True)
class LayerDecay:
    """`paramwise_cfg` of the layer-wise learning-rate decay, as published configs write it."""

    num_layers: int
    """Layers of the backbone, which it knows itself: published configs state them."""
    layer_decay_rate: float
    """Factor from the learning rate of one layer to that of the layer before."""
    depths: Sequence[int] | None = None
    """Layers of each level of the backbone, where it has levels."""
    offset_lr_scale: float = 1.0
    """Factor of the learning rate of the backbone's offsets (`is_offset`)."""
    dino_head: bool = False
    """A tenth of the learning rate for offsets and reference points of deformable attention in heads."""
    backbone_small_lr: bool = False
    """A tenth of the learning rate for all layers whose learning rate is scaled down."""

    def __post_init__(self) -> None:
        for name in ("layer_decay_rate", "offset_lr_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"optimizer.paramwise_cfg.{name}={value!r} must be a number above 0")
        if self.layer_decay_rate > 1:
            raise ConfigError(
                f"optimizer.paramwise_cfg.layer_decay_rate={self.layer_decay_rate!r} must be a number "
                "above 0 and at most 1"
            )
        for name in ("dino_head", "backbone_small_lr"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"optimizer.paramwise_cfg.{name}={getattr(self, name)!r} must be True or False"
                )

    @classmethod
    def of(cls, paramwise_cfg: Mapping[str, Any], backbone: Any) -> "LayerDecay":
        """The settings of a config for this backbone. Raises ConfigError for keys that are missing or
        unknown, and for layers that are not the backbone's."""
        if not backbone.depth:
            raise ConfigError(
                "optimizer.constructor is CustomLayerDecayOptimizerConstructor, but of this backbone "
                f"{type(backbone).__name__} no layers are known; drop the constructor, and paramwise_cfg with it, to "
                "give all layers the same learning rate"
            )
        known = [option.name for option in fields(cls)]
        for key in paramwise_cfg:
            if key not in known:
                raise unknown_key(key, known, "optimizer.paramwise_cfg")
        if "layer_decay_rate" not in paramwise_cfg:
            raise ConfigError(
                "optimizer.paramwise_cfg lacks 'layer_decay_rate'; write paramwise_cfg=dict(layer_decay_rate=0.95)"
            )
        found = cls(**{"num_layers": backbone.depth, **paramwise_cfg})
        found._check_depths(backbone)
        found._check_num_layers(backbone)
        return found

    def _check_depths(self, backbone: Any) -> None:
        if self.depths is None:
            return
        depths = getattr(backbone, "depths", None)
        if depths is None:
            raise ConfigError(
                f"optimizer.paramwise_cfg.depths={self.depths!r} counts the layers of levels, and "
                f"{type(backbone).__name__} has no levels; drop it"
            )
        if not isinstance(self.depths, Sequence) or list(self.depths) != list(depths):
            raise ConfigError(
                f"optimizer.paramwise_cfg.depths={self.depths!r}, but the levels of the backbone have "
                f"{list(depths)} layers (model.backbone.depths); make them equal"
            )

    def _check_num_layers(self, backbone: Any) -> None:
        if self.num_layers == backbone.depth:
            return
        depths = getattr(backbone, "depths", None)
        source = (
            "model.backbone.depth" if depths is None else f"the sum of model.backbone.depths={list(depths)}"
        )
        raise ConfigError(
            f"optimizer.paramwise_cfg.num_layers={self.num_layers!r}, but the backbone has "
            f"{counted(backbone.depth, 'layer')} ({source}); make them equal"
        )


@OPTIMIZER_BUILDERS.register_module(name="CustomLayerDecayOptimizerConstructor")
class LayerDecayOptimizerConstructor(DefaultOptimizerConstructor):
    """lr of a parameter = base lr * layer_decay_rate ** (num_layers + 1 - layer id), times the factors that
    `LayerDecay` has for offsets and the like.

    The layer ids of a backbone are its own (`layer_id(name)`), and so may be a head's (None: after the
    backbone); every other parameter counts as layer num_layers + 1. Those of an adapter count as the weight
    that it changes. Weight decay is 0 for 1-d parameters and
    biases, and for names with one of the backbone's `no_decay_words`. (The code for InternViT also exempts
    names that equal `pos_embed` or `cls_token`; as segmentors have them under `backbone.`, they do decay,
    there and here.)
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Appends one group for each trainable parameter of the segmentor `module`: params, lr, weight_decay,
        name.

        Raises ConfigError when the backbone has no layer ids, when `paramwise_cfg` does not describe it, or
        when a setting of it applies to no parameter.
        """
        backbone: Any = module.backbone
        if not hasattr(backbone, "layer_id"):
            raise ConfigError(
                "optimizer.constructor is CustomLayerDecayOptimizerConstructor, but backbone "
                f"{type(backbone).__name__} has no layer_id(name); "
                "drop the constructor to give all layers the same learning rate"
            )
        settings = LayerDecay.of(self.paramwise_cfg, backbone)
        kinds: set[str | None] = set()
        for name, param in module.named_parameters():
            layer = _layer_of(module, name, settings)
            kind = _kind_of(backbone, name, layer, settings)
            kinds.add(kind)
            if not param.requires_grad:
                continue
            decays = _decays(backbone, name, param)
            label = f"layer {layer}, {'decay' if decays else 'no decay'}"
            params.append(
                {
                    "params": [param],
                    "lr": self.base_lr * _scale_of(layer, kind, settings),
                    "weight_decay": self.base_wd if decays else 0.0,
                    "name": f"{label}, {kind}" if kind else label,
                }
            )
        _check_that_settings_apply(settings, kinds, backbone)


def _layer_of(segmentor: nn.Module, name: str, settings: LayerDecay) -> int:
    part, _, inner = name.partition(".")
    layer_id = getattr(getattr(segmentor, part), "layer_id", lambda _: None)
    layer: int | None = layer_id(plain_name(inner))
    return settings.num_layers + 1 if layer is None else layer


def _kind_of(backbone: Any, name: str, layer: int, settings: LayerDecay) -> str | None:
    """The setting of `LayerDecay` that scales the learning rate of this parameter in addition."""
    part, _, inner = name.partition(".")
    if part == "backbone":
        is_offset = getattr(backbone, "is_offset", lambda _: False)(plain_name(inner))
        return "offset_lr_scale" if settings.offset_lr_scale != 1 and is_offset else None
    behind_backbone = layer > settings.num_layers
    is_offset = any(word in name for word in HEADS_OFFSETS)
    return "dino_head" if settings.dino_head and behind_backbone and is_offset else None


def _scale_of(layer: int, kind: str | None, settings: LayerDecay) -> float:
    """Factor of the base learning rate."""
    scale = settings.layer_decay_rate ** (settings.num_layers + 1 - layer)
    if settings.backbone_small_lr and scale < 1:
        scale = 0.1 * scale
    if kind == "offset_lr_scale":
        return settings.offset_lr_scale * scale
    return 0.1 * scale if kind == "dino_head" else scale


def _decays(backbone: Any, name: str, param: nn.Parameter) -> bool:
    """Whether a parameter has weight decay."""
    return (
        len(full_shape(param)) > 1
        and not name.endswith(".bias")
        and not any(word in name for word in getattr(backbone, "no_decay_words", ()))
    )


def _check_that_settings_apply(settings: LayerDecay, kinds: set[str | None], backbone: Any) -> None:
    """kinds: of all parameters. Raises ConfigError for a setting that no parameter has."""
    if settings.offset_lr_scale != 1 and "offset_lr_scale" not in kinds:
        raise ConfigError(
            f"optimizer.paramwise_cfg.offset_lr_scale={settings.offset_lr_scale} finds no offsets "
            f"in backbone {type(backbone).__name__}; drop it"
        )
    if settings.dino_head and "dino_head" not in kinds:
        raise ConfigError(
            "optimizer.paramwise_cfg.dino_head=True finds no parameter named "
            f"{' or '.join(HEADS_OFFSETS)} in the heads; drop it"
        )
