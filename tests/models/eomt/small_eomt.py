"""A small EoMT, and transformers' with the same weights."""

import re

import torch
from mmcv import ConfigDict
from mmseg.models import build_segmentor
from torch import nn

import internseg_ds.models  # noqa: F401 - registers the segmentor
from internseg_ds.config.experiment import read_experiment
from tests.conftest import ROOT

CONFIG = ROOT / "configs/timm_tiny/eomt_dinov3_tiny_112_ade20k.py"
CLASSES, QUERIES, POINTS = 5, 6, 40


def config(**backbone) -> ConfigDict:
    """The demo's segmentor, with few classes and points. backbone: further settings of it."""
    model = read_experiment(CONFIG).model
    for name, value in {"drop_path_rate": 0.0, "with_cp": False, **backbone}.items():
        model.backbone[name] = value
    model.decode_head.num_classes, model.decode_head.num_queries = CLASSES, QUERIES
    model.decode_head.loss_cls.class_weight = [1.0] * CLASSES + [0.1]
    model.train_cfg.num_points = POINTS
    return model


def build(model: ConfigDict) -> nn.Module:
    """With weights that are all random: nothing stays at its starting one or zero."""
    torch.manual_seed(0)
    segmentor = build_segmentor(model)
    for name, param in segmentor.named_parameters():
        scale = name.endswith(("norm1.weight", "norm2.weight", "norm.weight"))
        nn.init.normal_(param, mean=float(scale), std=0.2)
    return segmentor


def config_of_transformers(**fields) -> ConfigDict:
    """The same with the same DINOv3, as transformers has it. fields: of its configuration."""
    model = config()
    dinov3 = dict(
        model_type="dinov3_vit",
        patch_size=16,
        intermediate_size=256,
        num_register_tokens=4,
        layer_norm_eps=1e-5,
        query_bias=False,
        value_bias=False,
    )
    model.backbone = ConfigDict(
        type="TransformersBackbone",
        config={**dinov3, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, **fields},
        out_indices=[3],
        final_norm=True,
    )
    return model


LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
"""transformers' name of each part of a block, and timm's."""
STEM = {
    "embeddings.cls_token": "backbone.model.cls_token",
    "embeddings.register_tokens": "backbone.model.reg_token",
    "embeddings.patch_embeddings": "backbone.model.patch_embed.proj",
    "layernorm": "backbone.model.norm",
}
HEAD = {
    "query": "decode_head.query",
    "class_predictor": "decode_head.class_head",
    **{f"mask_head.fc{n + 1}": f"decode_head.mask_head.{2 * n}" for n in range(3)},
    **{f"upscale_block.block.{n}.conv1": f"decode_head.upscale.{n}.0" for n in range(2)},
    **{f"upscale_block.block.{n}.conv2": f"decode_head.upscale.{n}.2" for n in range(2)},
    **{f"upscale_block.block.{n}.layernorm2d": f"decode_head.upscale.{n}.3.1" for n in range(2)},
}
"""The same of what is no block."""
ENDS = ("", ".weight", ".bias")


def transformers_eomt(segmentor: nn.Module, side: int) -> nn.Module:
    """transformers' EoMT on DINOv3, with the weights of ours, for images of side x side pixels."""
    from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    theirs = EomtDinov3ForUniversalSegmentation(
        EomtDinov3Config(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            layer_norm_eps=1e-5,
            image_size=side,
            num_queries=QUERIES,
            num_blocks=segmentor.decode_head.num_blocks,
            num_labels=CLASSES,
            train_num_points=POINTS,
            query_bias=False,
            value_bias=False,
            pos_embed_rescale=None,
        )
    )
    ours = segmentor.state_dict()
    weights = {} if hasattr(segmentor.backbone.model, "blocks") else _of_transformers(ours)
    weights = weights or _of_timm(ours)
    for their, our in HEAD.items():
        weights |= {their + end: ours[our + end] for end in ENDS if our + end in ours}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask_probs", "criterion.empty_weight"}, missing
    return theirs


THEIRS = {"model.layer.": "layers.", "norm.": "layernorm."}
RENAMED = re.compile(r"^(model\.layer\.|norm\.)")


def _of_timm(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names, weights = dict(STEM), {}
    for index in range(4):
        their, our = f"layers.{index}", f"backbone.model.blocks.{index}"
        names |= {f"{their}.{part}": f"{our}.{place}" for part, place in LAYER.items()}
        for part, value in zip("qkv", ours[f"{our}.attn.qkv.weight"].chunk(3), strict=True):
            weights[f"{their}.attention.{part}_proj.weight"] = value
        for number in (1, 2):
            weights[f"{their}.layer_scale{number}.lambda1"] = ours[f"{our}.gamma_{number}"]
    for their, our in names.items():
        weights |= {their + end: ours[our + end] for end in ENDS if our + end in ours}
    return weights


def _of_transformers(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "backbone.model."
    own = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}
    return {
        RENAMED.sub(lambda found: THEIRS[found[0]], name): value
        for name, value in own.items()
        if "mask_token" not in name and "inv_freq" not in name
    }
