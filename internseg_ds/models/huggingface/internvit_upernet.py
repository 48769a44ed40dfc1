"""InternViT with mmseg's UPerHead as a folder that brings its own code: transformers has no such segmentor."""

from pathlib import Path
from typing import Any

import torch

from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat, format_of, weight_names
from internseg_ds.models.huggingface.uper_head import check_uper_head

CODE = Path(__file__).with_name("modeling_internvit_upernet.py")
"""The names of its parameters are ours."""


def internvit_upernet_format(segmentor: Any) -> SegmentorFormat:
    """segmentor: with an `InternViT6B` and a UPerHead, on the meta device. Raises ValueError for a head with
    settings that the code does not have."""
    from internseg_ds.models.huggingface.modeling_internvit_upernet import (
        InternViTUperNetConfig,
        InternViTUperNetForSemanticSegmentation,
    )

    backbone, head, test = segmentor.backbone, check_uper_head(segmentor), segmentor.test_cfg
    arguments = backbone.arguments
    windows = (test.crop_size, test.stride) if test.mode == "slide" else (None, None)
    config = InternViTUperNetConfig(
        hidden_size=backbone.embed_dim,
        num_hidden_layers=backbone.depth,
        num_attention_heads=arguments["num_heads"],
        intermediate_size=int(backbone.embed_dim * arguments["mlp_ratio"]),
        image_size=backbone.img_size,
        patch_size=backbone.patch_size,
        num_channels=backbone.patch_embed.proj.in_channels,
        qkv_bias=arguments["qkv_bias"],
        qk_normalization=arguments["qk_normalization"],
        norm_type=arguments["norm_type"],
        layer_norm_eps=arguments["layer_norm_eps"],
        layer_scale=bool(backbone.init_values),
        layer_scale_fp32=getattr(backbone.blocks[0].ls1, "force_fp32", False),
        out_indices=backbone.out_indices,
        with_fpn=backbone.with_fpn,
        with_final_norm=backbone.with_fpn and len(backbone.up2) > 1,
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
        {name: (name,) for name in weight_names(segmentor)},
        loader="AutoModelForSemanticSegmentation",
        processor="SegformerImageProcessor",
        code=(CODE,),
    )
