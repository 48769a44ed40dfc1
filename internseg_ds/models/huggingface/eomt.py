"""EoMT on a DINOv3, of transformers or of timm, as transformers' EomtDinov3ForUniversalSegmentation; on one with gated
MLPs as that class with two activations, which the folder brings.

What stays different: their class returns masks and class scores of the queries, from which their image processor
makes labels; it enlarges masks before the sigmoid, and ours behind it, so labels differ along borders. It takes crops
of one size.
"""

import re
from types import NoneType
from typing import Any

import torch
from torch import nn

from internseg_ds.models.adapters.timm_backbone import TimmBackbone
from internseg_ds.models.huggingface.brought_code import FOLDER
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat, format_of, weight_names

HEAD = (
    (r"decode_head\.query\.", "query."),
    (r"decode_head\.class_head\.", "class_predictor."),
    (r"decode_head\.mask_head\.0\.", "mask_head.fc1."),
    (r"decode_head\.mask_head\.2\.", "mask_head.fc2."),
    (r"decode_head\.mask_head\.4\.", "mask_head.fc3."),
    (r"decode_head\.upscale\.(\d+)\.0\.", r"upscale_block.block.\1.conv1."),
    (r"decode_head\.upscale\.(\d+)\.2\.", r"upscale_block.block.\1.conv2."),
    (r"decode_head\.upscale\.(\d+)\.3\.1\.", r"upscale_block.block.\1.layernorm2d."),
)
"""Ours -> theirs: what a name begins with."""
TRANSFORMERS = (
    (r"backbone\.model\.embeddings\.", "embeddings."),
    (r"backbone\.model\.model\.layer\.", "layers."),
    (r"backbone\.model\.norm\.", "layernorm."),
)
BLOCK = r"backbone\.model\.blocks\.(\d+)\."
TIMM = (
    (r"backbone\.model\.cls_token", "embeddings.cls_token"),
    (r"backbone\.model\.reg_token", "embeddings.register_tokens"),
    (r"backbone\.model\.patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"backbone\.model\.norm\.", "layernorm."),
    (rf"{BLOCK}norm(\d)\.", r"layers.\1.norm\2."),
    (rf"{BLOCK}attn\.proj\.", r"layers.\1.attention.o_proj."),
    (rf"{BLOCK}attn\.q_bias", r"layers.\1.attention.q_proj.bias"),
    (rf"{BLOCK}attn\.v_bias", r"layers.\1.attention.v_proj.bias"),
    (rf"{BLOCK}mlp\.fc1\.", r"layers.\1.mlp.up_proj."),
    (rf"{BLOCK}mlp\.fc1_g\.", r"layers.\1.mlp.gate_proj."),
    (rf"{BLOCK}mlp\.fc1_x\.", r"layers.\1.mlp.up_proj."),
    (rf"{BLOCK}mlp\.fc2\.", r"layers.\1.mlp.down_proj."),
    (rf"{BLOCK}gamma_(\d)", r"layers.\1.layer_scale\2.lambda1"),
)
ACTIVATIONS: dict[type, str] = {nn.GELU: "gelu", nn.SiLU: "silu"}
GATED = FOLDER / "modeling_eomt_dinov3_gated.py"
FUSED = re.compile(rf"{BLOCK}attn\.qkv\.weight")
UNUSED = ("mask_token",)
"""Of masked pretraining."""
COPIED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "num_channels",
    "num_register_tokens",
    "query_bias",
    "key_bias",
    "value_bias",
    "proj_bias",
    "mlp_bias",
    "use_gated_mlp",
)
"""Fields of a DINOv3 that an EoMT has too."""


def eomt_format(segmentor: Any) -> SegmentorFormat:
    """segmentor: an `EoMT`, on the meta device. Raises ValueError where transformers' class would compute something
    else."""
    backbone, head, test = segmentor.backbone, segmentor.decode_head, segmentor.test_cfg
    if test.mode != "slide" or test.crop_size[0] != test.crop_size[1]:
        raise ValueError("EoMT there takes squares of one size, and model.test_cfg has no square crop_size")
    fields = _of_timm(backbone.model) if isinstance(backbone, TimmBackbone) else _of_transformers(backbone)
    config_class, kind, block_act = _classes(fields.pop("hidden_act"))
    config = config_class(
        **fields,
        **block_act,
        hidden_act="gelu",
        image_size=test.crop_size[0],
        num_queries=head.num_queries,
        num_blocks=head.num_blocks,
        num_upscale_blocks=len(head.upscale),
        num_labels=head.num_classes,
        no_object_weight=head.class_weight[-1],
        pos_embed_rescale=None,
    )
    if block_act:
        config.auto_map = {
            "AutoConfig": f"{GATED.stem}.{config_class.__name__}",
            "AutoModelForUniversalSegmentation": f"{GATED.stem}.{kind.__name__}",
        }
    with torch.device("meta"):
        theirs = kind(config)
    empty_weight = torch.ones(head.num_classes + 1)
    empty_weight[-1] = config.no_object_weight
    return format_of(
        segmentor,
        theirs,
        {name: _theirs(name) for name in weight_names(segmentor) if not name.endswith(UNUSED)},
        loader="AutoModelForUniversalSegmentation" if block_act else kind.__name__,
        processor="EomtImageProcessor",
        splits_images=True,
        # no query is masked after training
        constants={"attn_mask_probs": torch.zeros(head.num_blocks), "criterion.empty_weight": empty_weight},
        code=(GATED,) if block_act else (),
    )


def _classes(activation: str) -> tuple[Any, Any, dict[str, str]]:
    """The configuration and the class of an EoMT whose blocks have this activation, and how the configuration says
    so."""
    if activation == "gelu":
        from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

        return EomtDinov3Config, EomtDinov3ForUniversalSegmentation, {}
    from internseg_ds.models.huggingface.remote_code import modeling_eomt_dinov3_gated as code

    return (
        code.EomtDinov3GatedConfig,
        code.EomtDinov3GatedForUniversalSegmentation,
        {"block_act": activation},
    )


def _theirs(name: str) -> tuple[str, ...]:
    """Their names of one of our tensors."""
    if found := FUSED.fullmatch(name):
        return tuple(f"layers.{found[1]}.attention.{part}_proj.weight" for part in "qkv")
    for pattern, new in (*HEAD, *TRANSFORMERS, *TIMM):
        if re.match(pattern, name):
            return (re.sub(f"^{pattern}", new, name),)
    raise ValueError(f"EoMT there has nothing like {name}")


def _of_transformers(backbone: Any) -> dict[str, Any]:
    """Of a `TransformersBackbone` with a DINOv3, what of an EoMT's configuration is the backbone's."""
    _, config = backbone.exported("transformers")
    if config["model_type"] != "dinov3_vit":
        raise ValueError(f"EoMT on a {config['model_type']} has no counterpart there; that on DINOv3 has")
    return {name: config[name] for name in COPIED if name in config} | _positions(
        config["patch_size"], config["rope_theta"]
    )


def _positions(patch: Any, theta: float) -> dict[str, Any]:
    return {
        "patch_size": patch if isinstance(patch, int) else patch[0],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
    }


def _of_timm(model: Any) -> dict[str, Any]:
    """The same of timm's DINOv3."""
    rope: Any = getattr(model, "rope", None)
    if type(rope).__name__ != "RotaryEmbeddingDinoV3" or rope.normalize_coords != "separate":
        raise ValueError(f"EoMT on this {type(model).__name__} has no counterpart there; that on DINOv3 has")
    if rope.temperature is None:
        raise ValueError("the rotary positions of this DINOv3 have periods that EoMT there cannot have")
    block, names = model.blocks[0], {name for name, _ in model.blocks[0].named_parameters()}
    gated = type(block.mlp).__name__ == "SwiGLU"
    hidden = getattr(block.mlp, "fc1_x" if gated else "fc1", None)
    plain = isinstance(getattr(block.mlp, "norm", None), (nn.Identity, NoneType))
    activation = ACTIVATIONS.get(type(getattr(block.mlp, "act", None)))
    if hidden is None or activation is None or not plain or hidden.out_features != block.mlp.fc2.in_features:
        raise ValueError("EoMT there has plain or gated MLPs without a norm, which this DINOv3 has not")
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": hidden.out_features,
        "hidden_act": activation,
        "use_gated_mlp": gated,
        "layer_norm_eps": block.norm1.eps,
        "num_channels": model.patch_embed.proj.in_channels,
        "num_register_tokens": 0 if model.reg_token is None else model.reg_token.size(1),
        "query_bias": "attn.q_bias" in names,
        "value_bias": "attn.v_bias" in names,
    } | _positions(model.patch_embed.proj.kernel_size, rope.temperature)
