"""Weight files of small segmentors, as launch/consolidate.py writes them."""

from pathlib import Path

import torch
from mmcv import Config, ConfigDict
from mmcv.cnn.utils import revert_sync_batchnorm
from mmseg.models import build_segmentor
from torch import nn

import internseg_ds.models  # noqa: F401 - registers the backbones
from tests.conftest import ROOT, TINY
from tests.models.eomt import small_eomt
from tests.models.mask2former import small_mask2former

CLASSES = 7


def upernet(channels: list[int], side: int, /, **backbone) -> ConfigDict:
    model = Config.fromfile(ROOT / TINY).model
    model.backbone = ConfigDict(backbone)
    model.decode_head.update(in_channels=channels, channels=8, num_classes=CLASSES)
    model.auxiliary_head.update(in_channels=channels[2], channels=8, num_classes=CLASSES)
    model.test_cfg.update(crop_size=(side, side), stride=(side // 2, side // 2))
    return model


def internvit() -> ConfigDict:
    backbone = Config.fromfile(ROOT / TINY).model.backbone
    return upernet([16] * 4, 56, **{**backbone, "img_size": 56, "embed_dim": 16, "num_heads": 2})


def smallest() -> ConfigDict:
    """One block, and one convolution over its map."""
    model = internvit()
    model.backbone.update(depth=1, out_indices=[0], with_fpn=False)
    model.decode_head = ConfigDict(model.auxiliary_head, in_index=0)
    model.auxiliary_head = None
    return model


def adapter() -> ConfigDict:
    return upernet(
        [32] * 4,
        64,
        type="InternViTAdapter",
        patch_size=16,
        img_size=64,
        embed_dim=32,
        num_heads=2,
        depth=4,
        interaction_indexes=[[0, 0], [1, 1], [2, 2], [3, 3]],
        deform_num_heads=4,
        conv_inplane=8,
        use_flash_attn=False,
    )


def internimage() -> ConfigDict:
    return upernet(
        [16, 32, 64, 128],
        64,
        type="InternImage",
        channels=16,
        depths=[1, 1, 1, 1],
        groups=[1, 2, 4, 8],
        mlp_ratio=2.0,
        offset_scale=1.0,
        layer_scale=1.0,
        post_norm=True,
        center_feature_scale=True,
        dw_kernel_size=5,
    )


def dinov3() -> ConfigDict:
    return upernet(
        [32] * 4,
        64,
        type="TimmBackbone",
        model_name="vit_small_patch16_dinov3",
        img_size=64,
        model_args=dict(embed_dim=32, depth=4, num_heads=2),
        neck=dict(type="ViTFeaturePyramid"),
    )


def convnext() -> ConfigDict:
    return upernet(
        [8, 16, 24, 32],
        64,
        type="TimmBackbone",
        model_name="convnext_atto",
        model_args=dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    )


def transformers_dinov2() -> ConfigDict:
    config = dict(
        model_type="dinov2", hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=56
    )
    return upernet(
        [48] * 4, 56, type="TransformersBackbone", config=config, neck=dict(type="ViTFeaturePyramid")
    )


def transformers_dinov3() -> ConfigDict:
    config = dict(
        model_type="dinov3_vit",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_register_tokens=2,
    )
    return upernet(
        [32] * 4, 64, type="TransformersBackbone", config=config, neck=dict(type="ViTFeaturePyramid")
    )


def transformers_swin() -> ConfigDict:
    config = dict(
        model_type="swin",
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        image_size=64,
    )
    return upernet([16, 32, 64, 128], 64, type="TransformersBackbone", config=config)


def transformers_convnext() -> ConfigDict:
    config = dict(model_type="convnext", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    return upernet([8, 16, 24, 32], 64, type="TransformersBackbone", config=config)


def mask2former_internimage() -> ConfigDict:
    model = small_mask2former.config()
    model.backbone = internimage().backbone
    model.decode_head.in_channels = [16, 32, 64, 128]
    return windowed(model, 64)


def windowed(model: ConfigDict, side: int) -> ConfigDict:
    model.test_cfg = ConfigDict(mode="slide", crop_size=(side, side), stride=(side, side))
    return model


MODELS = {
    "smallest": smallest,
    "internvit": internvit,
    "internvit_adapter": adapter,
    "internimage": internimage,
    "dinov3": dinov3,
    "convnext": convnext,
    "transformers_dinov2": transformers_dinov2,
    "transformers_dinov3": transformers_dinov3,
    "transformers_swin": transformers_swin,
    "transformers_convnext": transformers_convnext,
    "eomt": lambda: windowed(small_eomt.config(), 64),
    "mask2former": lambda: windowed(small_mask2former.config(), 56),
    "mask2former_internimage": mask2former_internimage,
}


def drawn(model: ConfigDict) -> nn.Module:
    """With values that are all random, the statistics of batch norms and the offsets of samples too, and so large that
    maps keep their variation through all layers (He et al., arXiv:1502.01852): different pixels get different labels.
    """
    torch.manual_seed(0)
    segmentor = revert_sync_batchnorm(build_segmentor(model)).eval()
    for name, value in segmentor.state_dict().items():
        if value.is_floating_point():
            spread = 0.2 if value.dim() < 2 else (2 / value[0].numel()) ** 0.5
            scales = name.endswith("weight") and ("norm" in name or ".bn" in name)
            centre = 1.0 if "var" in name or scales else 0.0
            value.normal_(centre, 0.1 if centre else spread)
    return segmentor


def written(name: str, folder: Path, to_rgb: bool = True) -> tuple[nn.Module, Path]:
    """The segmentor of that name, and a .pth of it."""
    cfg = Config.fromfile(ROOT / TINY)
    cfg.model = MODELS[name]()
    for part in (cfg.data.val, cfg.data.test):
        for step in part.pipeline[-1].transforms:
            if step.type == "Normalize":
                step.to_rgb = to_rgb
    segmentor = drawn(cfg.model)
    outputs = segmentor.out_channels
    meta = {
        "CLASSES": [f"class {number}" for number in range(outputs)],
        "PALETTE": [[number, 255 - number, 7] for number in range(outputs)],
        "config": cfg.pretty_text,
    }
    path = folder / f"{name}.pth"
    torch.save({"meta": meta, "state_dict": segmentor.state_dict()}, path)
    return segmentor, path
