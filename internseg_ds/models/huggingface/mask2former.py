"""Mask2Former as transformers' Mask2FormerForUniversalSegmentation: over a backbone of stages that transformers has by
its own class, over others by that class with a backbone that the folder brings.

Their class returns masks and class scores of the queries, from which their image processor makes labels; it enlarges
masks before the sigmoid, and ours behind it, so labels differ along borders.
"""

import math
import re
from typing import Any

import torch
from mmdet.models.utils import SinePositionalEncoding
from torch import nn

from internseg_ds.models.huggingface.brought_code import BackboneCode, with_code
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat, format_of, weight_names

GROUPS, POINTS, LEVELS, MAPS = 32, 4, 3, 4
"""Of their pixel decoder: groups of norms, points of a head, maps that attend to each other, maps of the backbone."""
EPS = 1e-5
"""Of all their norms."""
ENCODER_ORDER = ("self_attn", "norm", "ffn", "norm")
DECODER_ORDER = ("cross_attn", "norm", "self_attn", "norm", "ffn", "norm")
PIXELS, QUERIES = "model.pixel_level_module.decoder.", "model.transformer_module."
ENCODER_LAYER, DECODER_LAYER = (
    r"pixel_decoder\.encoder\.layers\.(\d+)\.",
    r"transformer_decoder\.layers\.(\d+)\.",
)
FEATURES, QUERY_LAYER = rf"{PIXELS}encoder.layers.\1.", rf"{QUERIES}decoder.layers.\1."
HEAD = (
    (r"pixel_decoder\.input_convs\.(\d)\.conv\.", rf"{PIXELS}input_projections.\1.0."),
    (r"pixel_decoder\.input_convs\.(\d)\.gn\.", rf"{PIXELS}input_projections.\1.1."),
    (rf"{ENCODER_LAYER}attentions\.0\.", rf"{FEATURES}self_attn."),
    (rf"{ENCODER_LAYER}ffns\.0\.layers\.0\.0\.", rf"{FEATURES}fc1."),
    (rf"{ENCODER_LAYER}ffns\.0\.layers\.1\.", rf"{FEATURES}fc2."),
    (rf"{ENCODER_LAYER}norms\.0\.", rf"{FEATURES}self_attn_layer_norm."),
    (rf"{ENCODER_LAYER}norms\.1\.", rf"{FEATURES}final_layer_norm."),
    (r"pixel_decoder\.level_encoding\.weight", f"{PIXELS}level_embed"),
    (r"pixel_decoder\.lateral_convs\.0\.conv\.", f"{PIXELS}adapter_1.0."),
    (r"pixel_decoder\.lateral_convs\.0\.gn\.", f"{PIXELS}adapter_1.1."),
    (r"pixel_decoder\.output_convs\.0\.conv\.", f"{PIXELS}layer_1.0."),
    (r"pixel_decoder\.output_convs\.0\.gn\.", f"{PIXELS}layer_1.1."),
    (r"pixel_decoder\.mask_feature\.", f"{PIXELS}mask_projection."),
    (r"decoder_input_projs\.", f"{QUERIES}input_projections."),
    (rf"{DECODER_LAYER}attentions\.0\.attn\.", rf"{QUERY_LAYER}cross_attn."),
    (rf"{DECODER_LAYER}attentions\.1\.attn\.", rf"{QUERY_LAYER}self_attn."),
    (rf"{DECODER_LAYER}ffns\.0\.layers\.0\.0\.", rf"{QUERY_LAYER}fc1."),
    (rf"{DECODER_LAYER}ffns\.0\.layers\.1\.", rf"{QUERY_LAYER}fc2."),
    (rf"{DECODER_LAYER}norms\.0\.", rf"{QUERY_LAYER}cross_attn_layer_norm."),
    (rf"{DECODER_LAYER}norms\.1\.", rf"{QUERY_LAYER}self_attn_layer_norm."),
    (rf"{DECODER_LAYER}norms\.2\.", rf"{QUERY_LAYER}final_layer_norm."),
    (r"transformer_decoder\.post_norm\.", f"{QUERIES}decoder.layernorm."),
    (r"query_embed\.", f"{QUERIES}queries_embedder."),
    (r"query_feat\.", f"{QUERIES}queries_features."),
    (r"level_embed\.", f"{QUERIES}level_embed."),
    (r"cls_embed\.", "class_predictor."),
    (r"mask_embed\.0\.", f"{QUERIES}decoder.mask_predictor.mask_embedder.0.0."),
    (r"mask_embed\.2\.", f"{QUERIES}decoder.mask_predictor.mask_embedder.1.0."),
    (r"mask_embed\.4\.", f"{QUERIES}decoder.mask_predictor.mask_embedder.2.0."),
)
"""Names of the head -> theirs: what a name begins with."""
FUSED = re.compile(rf"{DECODER_LAYER}attentions\.1\.attn\.in_proj_(weight|bias)")
ENCODER = "model.pixel_level_module.encoder."
"""What the names of their backbone begin with."""


def mask2former_format(segmentor: Any, code: BackboneCode | None) -> SegmentorFormat:
    """segmentor: with a Mask2FormerHead, on the meta device. code: of the backbone; None: a `TransformersBackbone` of
    stages. Raises ValueError where transformers' class would compute something else."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    backbone, head = segmentor.backbone, segmentor.decode_head
    fields = _fields(head)
    if segmentor.with_neck:
        raise ValueError(f"model.neck={type(segmentor.neck).__name__} stands between backbone and head")
    if code is None:
        if backbone.neck is not None:
            raise ValueError(
                f"the backbone has a neck ({type(backbone.neck).__name__}), and Mask2Former there has none"
            )
        if head.in_index is not None and list(head.in_index) != list(range(len(backbone.channels))):
            raise ValueError(
                f"decode_head.in_index={list(head.in_index)} are not all maps of the backbone in turn"
            )
        _, staged = backbone.exported("transformers")
        config: Any = Mask2FormerConfig(backbone_config=staged, **fields)
        kind: Any = Mask2FormerForUniversalSegmentation
        ours = "backbone.model."
    else:
        channels = [conv.conv.in_channels for conv in head.pixel_decoder.input_convs][::-1]
        channels = [head.pixel_decoder.lateral_convs[0].conv.in_channels, *channels]
        kind, config = with_code(segmentor, code, fields, channels)
        ours = "backbone."
    with torch.device("meta"):
        theirs = kind(config)
    names = {
        name: _theirs(name.removeprefix("decode_head."))
        if name.startswith("decode_head.")
        else (name.replace(ours, ENCODER if code is None else f"{ENCODER}body.", 1),)
        for name in weight_names(segmentor)
    }
    return format_of(
        segmentor,
        theirs,
        names,
        loader="Mask2FormerForUniversalSegmentation" if code is None else "AutoModelForUniversalSegmentation",
        processor="Mask2FormerImageProcessor",
        processor_fields={"size_divisor": 0, "ignore_index": 255},
        constants={"criterion.empty_weight": torch.tensor(head.class_weight, dtype=torch.float32)},
        code=() if code is None else code.files("mask2former"),
    )


def _theirs(name: str) -> tuple[str, ...]:
    """Their names of one of the head's tensors."""
    if found := FUSED.fullmatch(name):
        return tuple(f"{QUERIES}decoder.layers.{found[1]}.self_attn.{part}_proj.{found[2]}" for part in "qkv")
    for pattern, new in HEAD:
        if re.match(pattern, name):
            return (re.sub(f"^{pattern}", new, name),)
    raise ValueError(f"Mask2Former there has nothing like decode_head.{name}")


def _fields(head: Any) -> dict[str, Any]:
    """The fields of a Mask2FormerConfig that are the head's. Raises ValueError for what it cannot have."""
    pixels, queries = head.pixel_decoder, head.transformer_decoder
    encoder, decoder = list(pixels.encoder.layers), list(queries.layers)
    sampling, attention = encoder[0].attentions[0], decoder[0].attentions[0]
    _check_pixel_decoder(pixels, sampling)
    _check_layers(encoder, ENCODER_ORDER, "pixel_decoder.encoder")
    _check_layers(decoder, DECODER_ORDER, "transformer_decoder")
    for place, encoding in (
        ("pixel_decoder.", pixels.postional_encoding),
        ("", head.decoder_positional_encoding),
    ):
        _check_positions(encoding, f"decode_head.{place}positional_encoding")
    if sampling.num_heads != attention.num_heads:
        raise ValueError(
            f"{sampling.num_heads} heads of the pixel decoder and {attention.num_heads} of the transformer decoder, "
            "and Mask2Former there has as many in both"
        )
    if head.align_corners:
        raise ValueError("decode_head.align_corners=True, and Mask2Former there has False")
    if head.num_transformer_feat_level != LEVELS:
        raise ValueError(
            f"decode_head.num_transformer_feat_level={head.num_transformer_feat_level}, and Mask2Former there has "
            f"{LEVELS}"
        )
    width = attention.embed_dims
    features = pixels.mask_feature.in_channels
    return {
        "feature_size": features,
        "mask_feature_size": pixels.mask_feature.out_channels,
        "hidden_dim": width,
        "encoder_feedforward_dim": encoder[0].ffns[0].layers[0][0].out_features,
        "dim_feedforward": decoder[0].ffns[0].layers[0][0].out_features,
        "encoder_layers": len(encoder),
        "decoder_layers": len(decoder) + 1,  # theirs counts the prediction before the first layer
        "num_attention_heads": attention.num_heads,
        "enforce_input_projection": features == width and isinstance(head.decoder_input_projs[0], nn.Conv2d),
        "num_queries": head.num_queries,
        "num_labels": head.num_classes,
        "no_object_weight": head.class_weight[-1],
    }


def _check_pixel_decoder(pixels: Any, sampling: Any) -> None:
    if (pixels.num_input_levels, pixels.num_encoder_levels) != (MAPS, LEVELS):
        raise ValueError(
            f"the pixel decoder has {pixels.num_input_levels} maps of which {pixels.num_encoder_levels} attend to each "
            f"other, and that of Mask2Former there {MAPS} and {LEVELS}"
        )
    if sampling.num_points != POINTS:
        raise ValueError(
            f"num_points={sampling.num_points} of pixel_decoder.encoder, and Mask2Former there has {POINTS}"
        )
    for module in (*pixels.input_convs, *pixels.lateral_convs, *pixels.output_convs):
        norm = getattr(module, "gn", None)
        if not isinstance(norm, nn.GroupNorm) or norm.num_groups != GROUPS or norm.eps != EPS:
            raise ValueError(
                f"its norms are no group norms of {GROUPS} groups (decode_head.pixel_decoder.norm_cfg), which "
                "Mask2Former there has; a run for such a folder has norm_cfg=dict(type='GN', num_groups=32) there"
            )
    if any(type(getattr(module, "activate", None)) is not nn.ReLU for module in pixels.output_convs):
        raise ValueError("its activations are no ReLU (decode_head.pixel_decoder.act_cfg)")


def _check_layers(layers: list[Any], order: tuple[str, ...], name: str) -> None:
    for layer in layers:
        if tuple(layer.operation_order) != order:
            raise ValueError(
                f"operation_order={layer.operation_order} of decode_head.{name}, and Mask2Former there has {order}"
            )
        if type(layer.ffns[0].activate) is not nn.ReLU or layer.ffns[0].num_fcs != 2:
            raise ValueError(
                f"ffn_cfgs of decode_head.{name} are no two linear layers with a ReLU, which Mask2Former there has"
            )


def _check_positions(encoding: Any, name: str) -> None:
    same = type(encoding) is SinePositionalEncoding and encoding.normalize and encoding.temperature == 10000
    if not same or not math.isclose(encoding.scale, 2 * math.pi) or encoding.offset:
        raise ValueError(
            f"{name} is no normalised SinePositionalEncoding with mmdet's defaults, which Mask2Former there has"
        )
