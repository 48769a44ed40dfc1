"""Parameter groups: which learning rate and weight decay each parameter gets, as mmcv's optimizer constructors describe it.

In: a model (whole or partitioned by ZeRO-3) and the config's `optimizer` section. Out: groups for a torch optimizer, one for each distinct setting.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS, OPTIMIZERS, DefaultOptimizerConstructor
from mmseg.core.builder import build_optimizer_constructor  # knows mmcv's constructors too
from torch import nn

from internseg_ds.errors import ConfigError, UserError, reason_of, shortened, unknown_key


def full_shape(param: nn.Parameter) -> torch.Size:
    """The shape of a parameter before ZeRO-3 partitioned it (afterwards `shape` is [0])."""
    return getattr(param, "ds_shape", param.shape)


PARAMWISE = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
)
CUSTOM = ("lr_mult", "decay_mult")
"""What mmcv's DefaultOptimizerConstructor reads of `paramwise_cfg` and of each of its `custom_keys` (mmcv 1.7, `runner/optimizer/default_constructor.py`)."""
HEADS_OFFSETS = ("sampling_offsets", "reference_points")
"""Parts of names that mark the offsets of deformable attention in heads."""


@dataclass(frozen=True)
class LayerDecay:
    """`paramwise_cfg` of the layer-wise learning-rate decay, as published configs write it."""

    num_layers: int
    """Layers of the backbone."""
    layer_decay_rate: float
    """What the learning rate shrinks by from one layer to the one before."""
    depths: Sequence[int] | None = None
    """Layers of each level of the backbone, where it has levels."""
    offset_lr_scale: float = 1.0
    """Scale of the learning rate of the backbone's offsets (`is_offset`)."""
    dino_head: bool = False
    """A tenth of the learning rate for offsets and reference points of deformable attention in heads."""
    backbone_small_lr: bool = False
    """A tenth of the learning rate for all layers that the decay scales down."""

    def __post_init__(self) -> None:
        for name in ("layer_decay_rate", "offset_lr_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"optimizer.paramwise_cfg.{name}={value!r} must be a number above 0")
        if self.layer_decay_rate > 1:
            raise ConfigError(
                f"optimizer.paramwise_cfg.layer_decay_rate={self.layer_decay_rate!r} must be a number above 0 and at most 1"
            )
        for name in ("dino_head", "backbone_small_lr"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"optimizer.paramwise_cfg.{name}={getattr(self, name)!r} must be True or False"
                )

    @classmethod
    def of(cls, paramwise_cfg: Mapping[str, Any], backbone: nn.Module) -> "LayerDecay":
        """Raises ConfigError for what is missing or unknown, and for layers that are not the backbone's."""
        known = [option.name for option in fields(cls)]
        for key in paramwise_cfg:
            if key not in known:
                raise unknown_key(key, known, "optimizer.paramwise_cfg")
        for key in ("num_layers", "layer_decay_rate"):
            if key not in paramwise_cfg:
                raise ConfigError(
                    f"optimizer.paramwise_cfg lacks {key!r}; write paramwise_cfg=dict(num_layers={backbone.depth}, layer_decay_rate=0.95)"
                )
        found, kind = cls(**paramwise_cfg), type(backbone).__name__
        if found.depths is not None:
            depths = getattr(backbone, "depths", None)
            if depths is None:
                raise ConfigError(
                    f"optimizer.paramwise_cfg.depths={found.depths!r} counts the layers of levels, and {kind} has no levels; drop it"
                )
            if not isinstance(found.depths, Sequence) or list(found.depths) != list(depths):
                raise ConfigError(
                    f"optimizer.paramwise_cfg.depths={found.depths!r}, but the levels of the backbone have {list(depths)} layers "
                    "(model.backbone.depths); make them equal"
                )
        if found.num_layers != backbone.depth:
            levels = getattr(backbone, "depths", None)
            which = (
                "model.backbone.depth"
                if levels is None
                else f"the sum of model.backbone.depths={list(levels)}"
            )
            raise ConfigError(
                f"optimizer.paramwise_cfg.num_layers={found.num_layers!r}, but the backbone has {backbone.depth} layers ({which}); "
                "make them equal"
            )
        return found


@OPTIMIZER_BUILDERS.register_module(name="CustomLayerDecayOptimizerConstructor")
class LayerDecayOptimizerConstructor(DefaultOptimizerConstructor):
    """Layer-wise learning-rate decay, as the segmentation code of InternVL, InternImage and BEiT defines it.

    lr of a parameter = base lr * layer_decay_rate ** (num_layers + 1 - layer id), times what `LayerDecay` says of offsets and the like. The layer ids of a
    backbone are its own (`layer_id(name)`), and so may be a head's (None: after the backbone); everything else counts as layer num_layers + 1. Weight decay
    is 0 for 1-d parameters and biases, and for names that hold one of the backbone's `no_decay_words`. (The code for InternViT also exempts names that equal
    `pos_embed` or `cls_token`; as segmentors hold them under `backbone.`, they do decay, there and here.)
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Appends one group per trainable parameter of the segmentor `module`.

        Raises ConfigError when the backbone has no layer ids, when `paramwise_cfg` does not describe it, or when a setting of it finds no parameter.
        """
        backbone = module.backbone
        if not hasattr(backbone, "layer_id"):
            raise ConfigError(
                f"optimizer.constructor is CustomLayerDecayOptimizerConstructor, but backbone {type(backbone).__name__} has no layer_id(name); "
                "drop the constructor to give all layers the same learning rate"
            )
        settings = LayerDecay.of(self.paramwise_cfg, backbone)
        no_decay_words = getattr(backbone, "no_decay_words", ())
        found = set()
        for name, param in module.named_parameters():
            part, _, inner = name.partition(".")
            layer = getattr(getattr(module, part), "layer_id", lambda _: None)(inner)
            layer = settings.num_layers + 1 if layer is None else layer
            scale = settings.layer_decay_rate ** (settings.num_layers + 1 - layer)
            if settings.backbone_small_lr and scale < 1:
                scale, _ = 0.1 * scale, found.add("backbone_small_lr")
            kind = None
            if (
                part == "backbone"
                and settings.offset_lr_scale != 1
                and getattr(backbone, "is_offset", lambda _: False)(inner)
            ):
                kind, scale = "offset_lr_scale", settings.offset_lr_scale * scale
            elif (
                part != "backbone"
                and settings.dino_head
                and layer > settings.num_layers
                and any(word in name for word in HEADS_OFFSETS)
            ):
                kind, scale = "dino_head", 0.1 * scale
            found.add(kind)
            decays = (
                len(full_shape(param)) > 1
                and not name.endswith(".bias")
                and not any(word in name for word in no_decay_words)
            )
            if param.requires_grad:
                params.append(
                    {
                        "params": [param],
                        "lr": self.base_lr * scale,
                        "weight_decay": self.base_wd if decays else 0.0,
                        "name": f"layer {layer}, {'decay' if decays else 'no decay'}"
                        + (f", {kind}" if kind else ""),
                    }
                )
        if settings.offset_lr_scale != 1 and "offset_lr_scale" not in found:
            raise ConfigError(
                f"optimizer.paramwise_cfg.offset_lr_scale={settings.offset_lr_scale} finds no offsets "
                f"in backbone {type(backbone).__name__}; drop it"
            )
        if settings.dino_head and "dino_head" not in found:
            raise ConfigError(
                f"optimizer.paramwise_cfg.dino_head=True finds no parameter named {' or '.join(HEADS_OFFSETS)} in the heads; drop it"
            )


def parameter_groups(model: nn.Module, optimizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, merged where lr and weight decay are the same; the order is that of first appearance.

    optimizer: the config's section; `constructor` picks the rule (default: mmcv's DefaultOptimizerConstructor), `paramwise_cfg` is its setting.
    Each group has params, lr, weight_decay, name. Raises ConfigError when lr is missing, a constructor gives groups other settings of their own, or nothing
    is left to train.
    """
    settings = {key: value for key, value in optimizer.items() if key not in ("constructor", "paramwise_cfg")}
    settings.setdefault("weight_decay", default_weight_decay(optimizer))
    if "lr" not in settings:
        raise ConfigError(
            f"optimizer has no lr; write optimizer=dict(type={optimizer.get('type', 'AdamW')!r}, lr=..., weight_decay=...)"
        )
    for required in ("lr", "weight_decay"):
        if not isinstance(settings[required], (int, float)) or not 0 <= settings[required] < math.inf:
            raise ConfigError(f"optimizer.{required}={settings[required]!r} must be a number of at least 0")
    kind, singles = optimizer.get("constructor", "DefaultOptimizerConstructor"), []
    if kind == "DefaultOptimizerConstructor":
        _check_paramwise(optimizer.get("paramwise_cfg") or {})
    try:
        paramwise_cfg = copy.deepcopy(optimizer.get("paramwise_cfg"))  # mmseg's constructors change it
        build_optimizer_constructor(
            {"type": kind, "optimizer_cfg": settings, "paramwise_cfg": paramwise_cfg}
        ).add_params(singles, model)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor refuses with
        raise ConfigError(
            f"optimizer.constructor={kind!r} cannot work with backbone {type(getattr(model, 'backbone', model)).__name__} and "
            f"paramwise_cfg={optimizer.get('paramwise_cfg')}: {reason_of(error)}"
        ) from error
    _check_own_settings(kind, settings, singles)
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for single in singles:
        lr, weight_decay = (
            single.get("lr", settings["lr"]),
            single.get("weight_decay", settings["weight_decay"]),
        )
        trainable = [param for param in single["params"] if param.requires_grad]
        if trainable:
            name = single.get("name") or single.get("group_name", f"lr {lr:g}, weight decay {weight_decay:g}")
            group = merged.setdefault(
                (lr, weight_decay, name), {"params": [], "lr": lr, "weight_decay": weight_decay, "name": name}
            )
            group["params"].extend(trainable)
    if not merged:
        raise ConfigError("no parameter of the model trains: everything is frozen")
    return list(merged.values())


def default_weight_decay(optimizer: Mapping[str, Any]) -> float:
    """What the optimizer's class takes where the config's section sets none; 0 for a class that is not known or has none."""
    return float(getattr(_parameters(optimizer).get("weight_decay"), "default", 0.0))


def _parameters(optimizer: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    kind = optimizer.get("type", "AdamW")
    found = OPTIMIZERS.get(kind) if isinstance(kind, str) else None
    return {} if found is None else inspect.signature(found).parameters


def _check_own_settings(
    constructor: str, settings: Mapping[str, Any], singles: Sequence[Mapping[str, Any]]
) -> None:
    """Groups differ in learning rate and weight decay alone here. Raises ConfigError."""
    known = {
        name: settings.get(name, parameter.default)
        for name, parameter in _parameters(settings).items()
        if name not in ("params", "lr", "weight_decay")
    }
    for single in singles:
        for key in known.keys() & single.keys():
            if single[key] != known[key]:
                raise ConfigError(
                    f"optimizer.constructor={constructor!r} gives a group {key}={single[key]!r}, where the optimizer has {known[key]!r}; "
                    "groups may differ in lr and weight_decay only"
                )


def _check_paramwise(paramwise_cfg: Any) -> None:
    """mmcv's constructor passes over keys that it does not know. Raises ConfigError."""
    if not isinstance(paramwise_cfg, Mapping):
        raise ConfigError(f"optimizer.paramwise_cfg={paramwise_cfg!r} must be a dict(...)")
    for key in paramwise_cfg:
        if key not in PARAMWISE:
            raise unknown_key(key, PARAMWISE, "optimizer.paramwise_cfg")
    for name, settings in (paramwise_cfg.get("custom_keys") or {}).items():
        for key in settings:
            if key not in CUSTOM:
                raise unknown_key(key, CUSTOM, f"optimizer.paramwise_cfg.custom_keys[{name!r}]")


def unmatched_custom_keys(model: nn.Module, optimizer: Mapping[str, Any]) -> list[str]:
    """A line for those of `paramwise_cfg.custom_keys` that stand in no parameter's name, and so change nothing."""
    keys = (optimizer.get("paramwise_cfg") or {}).get("custom_keys") or {}
    names = [name for name, _ in model.named_parameters()]
    unmatched = [key for key in keys if not any(key in name for name in names)]
    return (
        [f"optimizer.paramwise_cfg.custom_keys: no parameter's name holds {shortened(unmatched)}"]
        if unmatched
        else []
    )


def groups_in(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], names_of: nn.Module
) -> list[dict[str, Any]]:
    """The groups of the parameters of `names_of`, with those of `model` that have the same names: constructors look at shapes, which ZeRO-3 hides."""
    names, params = (
        {id(param): name for name, param in names_of.named_parameters()},
        dict(model.named_parameters()),
    )
    return [{**group, "params": [params[names[id(param)]] for param in group["params"]]} for group in groups]


def named_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups without their parameters: names, lr, weight_decay."""
    names = {id(param): name for name, param in model.named_parameters()}
    return [
        {
            "names": [names[id(param)] for param in group["params"]],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
