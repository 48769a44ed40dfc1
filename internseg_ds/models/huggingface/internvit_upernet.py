"""InternViT with mmseg's UPerHead as a folder that brings its own code: transformers has no such segmentor.

The backbone is ours (`InternViT6B`), whose names the code has, or transformers' InternVLVisionModel, with or without a
`ViTFeaturePyramid`.
"""

import re
from pathlib import Path
from typing import Any

import torch

from internseg_ds.models.adapters.transformers_backbone import TransformersBackbone
from internseg_ds.models.feature_pyramids import ViTFeaturePyramid
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat, format_of, weight_names
from internseg_ds.models.huggingface.uper_head import check_uper_head
from internseg_ds.models.intern_vit.published_keys import TRANSFORMERS
from internseg_ds.tensor_part import Part

CODE = Path(__file__).with_name("modeling_internvit_upernet.py")
MODEL_TYPE = "internvl_vision"
"""Of transformers' InternViT."""
LAST_NORM = "backbone.model.layernorm."
"""Of transformers' InternViT, which no map passes."""


def internvit_upernet_format(segmentor: Any) -> SegmentorFormat:
    """segmentor: with an InternViT and a UPerHead, on the meta device. Raises ValueError for settings that the code
    does not have."""
    from internseg_ds.models.huggingface.modeling_internvit_upernet import (
        InternViTUperNetConfig,
        InternViTUperNetForSemanticSegmentation,
    )

    backbone, head, test = segmentor.backbone, check_uper_head(segmentor), segmentor.test_cfg
    names: dict[str, tuple[str | Part, ...]] = {name: (name,) for name in weight_names(segmentor)}
    if isinstance(backbone, TransformersBackbone):
        fields = _fields_of_transformers(backbone)
        names = _names_of_transformers(backbone, names)
    else:
        fields = _fields(backbone)
    windows = (test.crop_size, test.stride) if test.mode == "slide" else (None, None)
    config = InternViTUperNetConfig(
        **fields,
        out_indices=backbone.out_indices,
        head_indices=head.in_index,
        head_channels=head.channels,
        pool_scales=head.psp_modules.pool_scales,
        align_corners=head.align_corners,
        loss_ignore_index=head.ignore_index,
        window_size=windows[0],
        window_stride=windows[1],
        num_labels=head.out_channels,
    )
    config.auto_map = {
        "AutoConfig": f"{CODE.stem}.{InternViTUperNetConfig.__name__}",
        **{
            auto: f"{CODE.stem}.{InternViTUperNetForSemanticSegmentation.__name__}"
            for auto in ("AutoModel", "AutoModelForSemanticSegmentation")
        },
    }
    with torch.device("meta"):
        theirs = InternViTUperNetForSemanticSegmentation(config)
    return format_of(
        segmentor,
        theirs,
        names,
        loader="AutoModelForSemanticSegmentation",
        processor="SegformerImageProcessor",
        code=(CODE,),
    )


def _fields(backbone: Any) -> dict[str, Any]:
    """What of the code's configuration an `InternViT6B` says."""
    arguments = backbone.arguments
    return {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": int(backbone.embed_dim * arguments["mlp_ratio"]),
        "image_size": backbone.img_size,
        "patch_size": backbone.patch_size,
        "num_channels": backbone.patch_embed.proj.in_channels,
        "qkv_bias": arguments["qkv_bias"],
        "qk_normalization": arguments["qk_normalization"],
        "norm_type": arguments["norm_type"],
        "layer_norm_eps": arguments["layer_norm_eps"],
        "layer_scale": bool(backbone.init_values),
        "layer_scale_fp32": getattr(backbone.blocks[0].ls1, "force_fp32", False),
        "with_fpn": backbone.with_fpn,
        "with_final_norm": backbone.with_fpn and len(backbone.up2) > 1,
    }


def _fields_of_transformers(backbone: Any) -> dict[str, Any]:
    """The same of a `TransformersBackbone`."""
    neck = backbone.neck
    if neck is not None and type(neck) is not ViTFeaturePyramid:
        raise ValueError(f"the code has no neck {type(neck).__name__}; it has ViTFeaturePyramid")
    if backbone.final_norm:
        raise ValueError("final_norm=True of the backbone, and the code has no last norm")
    _, config = backbone.exported("transformers")
    if config["hidden_act"] != "gelu" or not config["use_absolute_position_embeddings"]:
        raise ValueError("the code has a GELU and an absolute position embedding alone")
    sizes = {}
    for name in ("image_size", "patch_size"):
        side = config[name]
        if not isinstance(side, int) and side[0] != side[1]:
            raise ValueError(f"{name}={side} of the backbone, and the code takes squares")
        sizes[name] = side if isinstance(side, int) else side[0]
    names = [] if neck is None else [name for name, _ in neck.named_parameters()]
    copied = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
    return {
        **{name: config[name] for name in (*copied, "norm_type", "layer_norm_eps")},
        **sizes,
        "qkv_bias": config["attention_bias"],
        "qk_normalization": config["use_qk_norm"],
        "with_fpn": neck is not None,
        "with_final_norm": neck is not None and any(name.startswith("stages.1.1.") for name in names),
    }


def _names_of_transformers(
    backbone: Any, names: dict[str, tuple[str | Part, ...]]
) -> dict[str, tuple[str | Part, ...]]:
    """`names` with those of the code for transformers' InternViT and its pyramid."""
    found: dict[str, tuple[str | Part, ...]] = {}
    for ours, theirs in TRANSFORMERS.names(backbone.depth).items():
        for index, name in enumerate(theirs):
            part = f"backbone.{ours}" if len(theirs) == 1 else Part(f"backbone.{ours}", index, len(theirs))
            found[f"backbone.model.{name}"] = (part,)
    pyramid = {
        name: (
            re.sub(r"^backbone\.neck\.stages\.(\d)", lambda stage: f"backbone.up{int(stage[1]) + 1}", name),
        )
        for name in names
        if not name.startswith("backbone.model.")
    }
    known = {name: found[name] for name in names if name in found} | pyramid
    if unknown := [name for name in names if name not in known and not name.startswith(LAST_NORM)]:
        raise ValueError(f"the code has nothing like {unknown[0]}")
    return known
