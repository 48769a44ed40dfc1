"""Backbones whose code a folder can bring (`remote_code`): their settings there."""

import json
from typing import Any

from torch import nn

from internseg_ds.models.adapters.timm_backbone import TimmBackbone
from internseg_ds.models.adapters.transformers_backbone import TransformersBackbone
from internseg_ds.models.adapters.transformers_plain import PlainModel
from internseg_ds.models.huggingface.brought_code import BackboneCode
from internseg_ds.models.huggingface.decode_heads import pyramid_settings
from internseg_ds.models.intern_image.intern_image import InternImage
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B
from internseg_ds.models.intern_vit.vit_adapter import InternViTAdapter
from internseg_ds.torch_internals import BATCH_NORM


def code_of(backbone: Any) -> BackboneCode | None:
    """The code of a backbone, which may lie on the meta device; None where there is none. Raises ValueError for
    settings that the code does not have."""
    if isinstance(backbone, InternViTAdapter):
        settings = _vit_adapter(backbone)
        return BackboneCode("vit_adapter", "VitAdapter", settings, imports=("modeling_internvit",))
    if isinstance(backbone, InternViT6B):
        return BackboneCode("internvit", "InternViT", _internvit(backbone))
    if isinstance(backbone, InternImage):
        return BackboneCode("internimage", "InternImage", _internimage(backbone))
    if isinstance(backbone, TimmBackbone):
        return BackboneCode("timm", "Timm", _timm(backbone))
    if isinstance(backbone, TransformersBackbone) and isinstance(backbone._kind, PlainModel):
        return BackboneCode("plain_transformer", "PlainTransformer", _plain_transformer(backbone))
    if isinstance(backbone, TransformersBackbone):
        return BackboneCode("staged_transformer", "StagedTransformer", _staged_transformer(backbone))
    return None


def _internvit(backbone: Any) -> dict[str, Any]:
    """`InternViTSettings`."""
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
        "out_indices": list(backbone.out_indices),
        "with_fpn": backbone.with_fpn,
        "with_final_norm": backbone.with_fpn and len(backbone.up2) > 1,
    }


def _vit_adapter(backbone: Any) -> dict[str, Any]:
    """`VitAdapterSettings`."""
    interaction, last = backbone.interactions[0], backbone.interactions[-1]
    attention, mlp = interaction.injector.attn, getattr(interaction.extractor, "ffn", None)
    return {
        "vit": _internvit(backbone) | {"patch_size": backbone.vit_patch},
        "heads": attention.heads,
        "points": attention.points,
        "inner": attention.value_proj.out_features,
        "hidden": None if mlp is None else mlp.fc1.out_features,
        "parts": [list(part) for part in backbone.parts],
        "extra_extractors": len(last.extra_extractors),
        "stem": backbone.spm.stem[0].out_channels,
        "finest": backbone.up is not None,
        "final_norm": hasattr(backbone, "norm4"),
        "add_vit_feature": backbone.add_vit_feature,
    }


def _internimage(backbone: Any) -> dict[str, Any]:
    """`InternImageSettings`."""
    levels = list(backbone.levels)
    block, stem = levels[0].blocks[0], backbone.patch_embed
    channels = stem.conv2.out_channels
    return {
        "channels": channels,
        "depths": list(backbone.depths),
        "groups": [level.blocks[0].dcn.group for level in levels],
        "mlp_ratio": block.mlp.fc1.out_features / channels,
        "act_layer": type(stem.act).__name__,
        "norm_layer": "BN" if any(isinstance(part, BATCH_NORM) for part in stem.norm1) else "LN",
        "layer_scale": block.layer_scale is not None,
        "offset_scale": block.dcn.geometry.offset_scale,
        "post_norm": block.post_norm,
        "dw_kernel_size": block.dcn.dw_conv[0].kernel_size[0],
        "res_post_norm": not isinstance(block.res_post_norm1, nn.Identity),
        "center_feature_scale": block.dcn.center_feature_scale,
        "post_norm_ids": list(levels[2].post_norm_ids) if len(levels) > 2 else [],
        "out_indices": list(backbone.out_indices),
        "num_channels": backbone.image_channels,
    }


def _timm(backbone: Any) -> dict[str, Any]:
    """The arguments of `TimmModel`."""
    try:
        arguments = json.loads(json.dumps(backbone.built_with))
    except TypeError as error:
        raise ValueError(f"model.backbone.model_args cannot be written as JSON: {error}") from None
    return {
        "model_name": backbone.model_name,
        "model_args": arguments,
        "out_indices": list(backbone.out_indices),
        "final_norm": backbone.final_norm,
        "pyramid": pyramid_settings(backbone.neck),
    }


def _plain_transformer(backbone: Any) -> dict[str, Any]:
    """The arguments of `PlainTransformer`."""
    kind: PlainModel = backbone._kind
    _, fields = backbone.exported("transformers")
    unused = ("architectures", "out_indices")
    return {
        "model": {name: value for name, value in fields.items() if name not in unused},
        "patch_size": list(kind.patch),
        "out_indices": list(kind.chosen),
        "blocks": kind.blocks_name,
        "norm": kind.norm,
        "final_norm": kind.final_norm,
        "pyramid": pyramid_settings(backbone.neck),
    }


def _staged_transformer(backbone: Any) -> dict[str, Any]:
    """The arguments of `StagedTransformer`."""
    _, fields = backbone.exported("transformers")
    return {
        "model": {name: value for name, value in fields.items() if name != "architectures"},
        "pyramid": pyramid_settings(backbone.neck),
    }
