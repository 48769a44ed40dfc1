"""Checks of the settings of heads that classify masks (`Mask2FormerHead`, `EoMTHead`) that mmdet would ignore,
or fail with in the first training step. Each raises ValueError."""

import inspect
from collections.abc import Mapping
from typing import Any

from mmdet.models.dense_heads import Mask2FormerHead as MmdetHead

TRAIN_KEYS = ("num_points", "oversample_ratio", "importance_sample_ratio", "assigner", "sampler")
"""Keys that these heads read of train_cfg."""
BOUNDS = {"num_points": (1, None), "oversample_ratio": (1, None), "importance_sample_ratio": (0, 1)}
"""Least and greatest value, None for any."""


def check_train_cfg(
    train_cfg: Mapping[str, Any] | None, head: str, *, segmentor: str, required: str, example: str
) -> None:
    """train_cfg: that of the segmentor, which passes it to the head. head, segmentor: the names of their
    classes. required: the keys that it cannot do without, in words. example: a config that has
    them."""
    if not train_cfg or "assigner" not in train_cfg:
        raise ValueError(
            f"{head} needs model.type={segmentor!r}, and model.train_cfg with {required}; take those of "
            f"{example}"
        )
    if unknown := sorted(set(train_cfg) - set(TRAIN_KEYS)):
        raise ValueError(
            f"model.train_cfg has {', '.join(unknown)}, which {head} does not know; it knows "
            f"{', '.join(TRAIN_KEYS)}"
        )
    for name, (least, most) in BOUNDS.items():
        value = train_cfg.get(name, least)
        whole = name == "num_points"
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not is_number or value < least or (most is not None and value > most):
            raise ValueError(
                f"model.train_cfg.{name}={value!r} must be a {'whole number' if whole else 'number'} of at "
                f"least {least}{'' if most is None else f' and at most {most}'}"
            )


def check_layers(
    pixel_decoder: Mapping[str, Any], transformer_decoder: Mapping[str, Any], levels: int
) -> None:
    """levels: num_transformer_feat_level, the number of maps that queries attend to."""
    for name, sequence in (
        ("transformer_decoder", transformer_decoder),
        ("pixel_decoder.encoder", pixel_decoder["encoder"]),
    ):
        layers = sequence["transformerlayers"]
        # mmdet's constructor reads their sizes from the dict
        if not isinstance(layers, Mapping) or not isinstance(layers["attn_cfgs"], Mapping):
            raise ValueError(
                f"{name}.transformerlayers of Mask2FormerHead must be one dict for all layers, and its "
                "attn_cfgs one dict for all attentions"
            )
    found = pixel_decoder["encoder"]["transformerlayers"]["attn_cfgs"].get("num_levels", 4)  # mmcv's default
    if found != levels:
        raise ValueError(
            f"num_transformer_feat_level={levels}, but attn_cfgs.num_levels of the pixel decoder is "
            f"{found}; make them equal"
        )


def check_arguments(arguments: Mapping[str, Any], num_classes: int) -> None:
    """arguments: those of Mask2FormerHead that are mmdet's."""
    if unknown := sorted(set(arguments) - set(inspect.signature(MmdetHead.__init__).parameters)):
        # mmdet takes any keyword, and ignores it
        raise ValueError(f"Mask2FormerHead has no argument {', '.join(unknown)}")
    check_losses(arguments, num_classes)


def check_losses(arguments: Mapping[str, Any], num_classes: int) -> None:
    """arguments: of a head, with loss_cls, loss_mask and, where it is not 100, num_queries. num_classes:
    without "no object"."""
    queries = arguments.get("num_queries", 100)
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
        raise ValueError(f"num_queries={queries!r} must be a whole number of at least 1")
    for name, sigmoid in (("loss_cls", False), ("loss_mask", True)):
        if arguments[name].get("use_sigmoid", False) != sigmoid:
            raise ValueError(
                f"{name}.use_sigmoid must be {sigmoid}: a query has one class of several, and each point "
                "of its mask is yes or no"
            )
    weights = arguments["loss_cls"].get("class_weight")
    count = len(weights) if isinstance(weights, (list, tuple)) else "no"
    if count != num_classes + 1:
        raise ValueError(
            f"loss_cls.class_weight has {count} weights; it needs one for each of {num_classes} classes "
            "and one for no object"
        )
