"""Parameter groups: which learning rate and weight decay each parameter gets, as mmcv's optimizer constructors describe it.

In: a model (whole or partitioned by ZeRO-3) and the config's `optimizer` section. Out: groups for a torch optimizer, one for each distinct setting.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS, DefaultOptimizerConstructor, build_optimizer_constructor
from torch import nn

from internseg_ds.errors import ConfigError


def full_shape(param: nn.Parameter) -> torch.Size:
    """The shape of a parameter before ZeRO-3 partitioned it (afterwards `shape` is [0])."""
    return getattr(param, "ds_shape", param.shape)


@OPTIMIZER_BUILDERS.register_module(name="CustomLayerDecayOptimizerConstructor")
class LayerDecayOptimizerConstructor(DefaultOptimizerConstructor):
    """Layer-wise learning-rate decay, as InternVL's and BEiT's segmentation code define it.

    lr of a parameter = base lr * layer_decay_rate ** (num_layers + 1 - layer id). The layer ids of a backbone are the backbone's own
    (`layer_id(name)`); everything outside it counts as layer num_layers + 1. Weight decay is 0 for 1-d parameters and biases. (The published code
    also exempts names that equal `pos_embed` or `cls_token`; as segmentors hold them under `backbone.`, they do decay, there and here.)
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Appends one group per trainable parameter of the segmentor `module`.

        Raises ConfigError when the backbone has no layer ids, or when `paramwise_cfg.num_layers` is not its depth.
        """
        backbone = module.backbone
        if not hasattr(backbone, "layer_id"):
            raise ConfigError(f"optimizer.constructor is CustomLayerDecayOptimizerConstructor, but backbone {type(backbone).__name__} has no layer_id(name); "
                              "drop the constructor to give all layers the same learning rate")
        try:
            depth, decay = self.paramwise_cfg["num_layers"], self.paramwise_cfg["layer_decay_rate"]
        except KeyError as missing:
            raise ConfigError(f"optimizer.paramwise_cfg lacks {missing}; write paramwise_cfg=dict(num_layers={backbone.depth}, layer_decay_rate=0.95)") from None
        if not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise ConfigError(f"optimizer.paramwise_cfg.layer_decay_rate={decay!r} must be a number above 0 and at most 1")
        if depth != backbone.depth:
            raise ConfigError(f"optimizer.paramwise_cfg.num_layers={depth}, but the backbone has {backbone.depth} layers (model.backbone.depth); make them equal")
        for name, param in module.named_parameters():
            if param.requires_grad:
                layer = backbone.layer_id(name.removeprefix("backbone.")) if name.startswith("backbone.") else depth + 1
                decays = len(full_shape(param)) > 1 and not name.endswith(".bias")
                params.append({
                    "params": [param],
                    "lr": self.base_lr * decay ** (depth + 1 - layer),
                    "weight_decay": self.base_wd if decays else 0.0,
                    "name": f"layer {layer}, {'decay' if decays else 'no decay'}",
                })


def parameter_groups(model: nn.Module, optimizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, merged where lr and weight decay are the same; the order is that of first appearance.

    optimizer: the config's section; `constructor` picks the rule (default: mmcv's DefaultOptimizerConstructor), `paramwise_cfg` is its setting.
    Each group has params, lr, weight_decay, name. Raises ConfigError when lr or weight_decay is missing, or nothing is left to train.
    """
    settings = {key: value for key, value in optimizer.items() if key not in ("constructor", "paramwise_cfg")}
    for required in ("lr", "weight_decay"):  # torch's default decay differs from optimizer to optimizer, so it is written out
        if required not in settings:
            raise ConfigError(f"optimizer has no {required}; the InternViT recipe is lr=4e-5, weight_decay=0.05")
        if not isinstance(settings[required], (int, float)) or not 0 <= settings[required] < math.inf:
            raise ConfigError(f"optimizer.{required}={settings[required]!r} must be a number of at least 0")
    try:
        constructor = build_optimizer_constructor({
            "type": optimizer.get("constructor", "DefaultOptimizerConstructor"),
            "optimizer_cfg": settings,
            "paramwise_cfg": optimizer.get("paramwise_cfg"),
        })
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.constructor={optimizer.get('constructor')!r} cannot work: {error}") from None
    singles: list[dict[str, Any]] = []
    constructor.add_params(singles, model)
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for single in singles:
        lr, weight_decay = single.get("lr", settings["lr"]), single.get("weight_decay", settings["weight_decay"])
        trainable = [param for param in single["params"] if param.requires_grad]
        if trainable:
            name = single.get("name", f"lr {lr:g}, weight decay {weight_decay:g}")
            group = merged.setdefault((lr, weight_decay, name), {"params": [], "lr": lr, "weight_decay": weight_decay, "name": name})
            group["params"].extend(trainable)
    if not merged:
        raise ConfigError("no parameter of the model trains: everything is frozen")
    return list(merged.values())
