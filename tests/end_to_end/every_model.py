"""A tiny segmentor around each backbone, neck and decode head of mmseg's registry, by name, and a short run
of it: two steps and an evaluation.

A name in CASES is that of the registry, or says the setting that the case is about.
"""

import json
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmcv import Config

from tests.conftest import ROOT, free_port
from tests.forks import start_ranks

CLASSES, CROP, STEPS = 150, 64, 2
LIMIT_S, LEAVE_S = 150, 5
"""In which a case must end, and a process whose other has ended."""
BN = dict(type="BN", requires_grad=True)
CROSS_ENTROPY = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)


def head(
    kind: str, in_channels: Any = 64, in_index: Any = 3, channels: int = 16, **arguments: Any
) -> dict[str, Any]:
    settings = dict(norm_cfg=BN, num_classes=CLASSES, align_corners=False, loss_decode=CROSS_ENTROPY)
    return dict(
        type=kind, in_channels=in_channels, in_index=in_index, channels=channels, **{**settings, **arguments}
    )


def fcn(in_channels: int = 64, in_index: int = 3, **arguments: Any) -> dict[str, Any]:
    return head("FCNHead", in_channels, in_index, **{"num_convs": 1, "concat_input": False, **arguments})


def levels(kind: str, in_channels: tuple[int, ...] = (8, 16, 32, 64), **arguments: Any) -> dict[str, Any]:
    """A head that takes several maps."""
    return head(kind, list(in_channels), list(range(len(in_channels))), **arguments)


def resnet(kind: str = "ResNet", depth: int = 18, base_channels: int = 8, **arguments: Any) -> dict[str, Any]:
    """Maps of 8, 16, 32 and 64 channels."""
    settings = dict(
        stem_channels=8, num_stages=4, out_indices=(0, 1, 2, 3), norm_cfg=BN, norm_eval=False, style="pytorch"
    )
    return dict(type=kind, depth=depth, base_channels=base_channels, **settings | arguments)


def vit(kind: str = "VisionTransformer", **arguments: Any) -> dict[str, Any]:
    """Four maps of 32 channels, a sixteenth of the image's size."""
    settings = dict(
        img_size=(CROP, CROP),
        patch_size=16,
        embed_dims=32,
        num_layers=4,
        num_heads=2,
        out_indices=(0, 1, 2, 3),
    )
    return dict(type=kind, **settings | arguments)


def segmentor(
    backbone: dict[str, Any], decode_head: Any = None, auxiliary_head: Any = None, **arguments: Any
) -> dict[str, Any]:
    settings = dict(
        type="EncoderDecoder",
        pretrained=None,
        train_cfg=dict(),
        test_cfg=dict(mode="slide", crop_size=(CROP, CROP), stride=(48, 48)),
    )
    return dict(
        backbone=backbone,
        decode_head=decode_head or fcn(),
        auxiliary_head=auxiliary_head,
        **settings | arguments,
    )


def on_resnet(decode_head: Any, auxiliary_head: Any = None, **arguments: Any) -> dict[str, Any]:
    return segmentor(resnet(), decode_head, auxiliary_head, **arguments)


def small_swin(kind: str = "SwinTransformer", **arguments: Any) -> dict[str, Any]:
    return dict(
        type=kind,
        **dict(
            pretrain_img_size=CROP, embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4
        )
        | arguments,
    )


def pyramid(kind: str, **arguments: Any) -> dict[str, Any]:
    """Twins."""
    return dict(
        type=kind,
        **dict(
            embed_dims=[8, 16, 32, 64],
            num_heads=[1, 2, 4, 8],
            depths=[2, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=[2, 2, 2, 2],
            norm_after_stage=False,
        )
        | arguments,
    )


def knet() -> dict[str, Any]:
    update = dict(
        type="KernelUpdateHead",
        num_classes=CLASSES,
        num_ffn_fcs=2,
        num_heads=2,
        num_mask_fcs=1,
        feedforward_channels=32,
        in_channels=16,
        out_channels=16,
        feat_transform_cfg=dict(conv_cfg=dict(type="Conv2d"), act_cfg=None),
        ffn_act_cfg=dict(type="ReLU", inplace=True),
        kernel_updator_cfg=dict(
            type="KernelUpdator",
            in_channels=16,
            feat_channels=16,
            out_channels=16,
            act_cfg=dict(type="ReLU", inplace=True),
            norm_cfg=dict(type="LN"),
        ),
    )
    return dict(
        type="IterativeDecodeHead",
        num_stages=2,
        kernel_update_head=[update, dict(update)],
        kernel_generate_head=fcn(num_convs=2, concat_input=True),
    )


def cascade(*heads: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return on_resnet(list(heads), **dict(type="CascadeEncoderDecoder", num_stages=len(heads)) | arguments)


STDC = dict(
    type="STDCNet",
    stdc_type="STDCNet1",
    in_channels=3,
    channels=(8, 16, 32, 32, 64),
    bottleneck_type="cat",
    num_convs=4,
    norm_cfg=BN,
    act_cfg=dict(type="ReLU"),
    with_final_conv=False,
)
HR = dict(
    stage1=dict(num_modules=1, num_branches=1, block="BOTTLENECK", num_blocks=(1,), num_channels=(8,)),
    stage2=dict(num_modules=1, num_branches=2, block="BASIC", num_blocks=(1, 1), num_channels=(8, 16)),
    stage3=dict(num_modules=2, num_branches=3, block="BASIC", num_blocks=(1, 1, 1), num_channels=(8, 16, 32)),
    stage4=dict(
        num_modules=1, num_branches=4, block="BASIC", num_blocks=(1, 1, 1, 1), num_channels=(8, 16, 32, 64)
    ),
)
MMCLS = dict(imports=["mmcls.models"], allow_failed_imports=False)

BACKBONES: dict[str, dict[str, Any]] = {
    "ResNet": on_resnet(fcn(), fcn(32, 2)),
    "ResNetV1c": segmentor(resnet("ResNetV1c")),
    "ResNetV1d": segmentor(resnet("ResNetV1d")),
    "ResNeXt": segmentor(resnet("ResNeXt", 50, groups=2, base_width=4), fcn(256)),
    "ResNeSt": segmentor(resnet("ResNeSt", 50, radix=2, reduction_factor=4), fcn(256)),
    "HRNet": segmentor(
        dict(type="HRNet", norm_cfg=BN, norm_eval=False, extra=HR),
        levels("FCNHead", num_convs=1, input_transform="resize_concat"),
    ),
    "UNet": segmentor(
        dict(
            type="UNet",
            base_channels=8,
            num_stages=4,
            strides=(1,) * 4,
            enc_num_convs=(2,) * 4,
            dec_num_convs=(2,) * 3,
            downsamples=(True,) * 3,
            enc_dilations=(1,) * 4,
            dec_dilations=(1,) * 3,
            norm_cfg=BN,
        ),
        fcn(8, 3),
        fcn(16, 2),
    ),
    "MobileNetV2": segmentor(
        dict(type="MobileNetV2", widen_factor=0.25, out_indices=(1, 2, 4, 6), norm_cfg=BN), fcn(80)
    ),
    "MobileNetV3": segmentor(
        dict(type="MobileNetV3", arch="small", out_indices=(0, 1, 12), norm_cfg=BN), fcn(576, 2)
    ),
    "CGNet": segmentor(
        dict(
            type="CGNet",
            num_channels=(8, 16, 32),
            num_blocks=(2, 3),
            dilations=(2, 4),
            reductions=(4, 4),
            norm_cfg=BN,
        ),
        fcn(64, 2),
    ),
    "FastSCNN": segmentor(
        dict(
            type="FastSCNN",
            downsample_dw_channels=(8, 16),
            global_in_channels=16,
            global_block_channels=(16, 24, 32),
            global_block_strides=(2, 2, 1),
            global_out_channels=32,
            higher_in_channels=16,
            lower_in_channels=32,
            fusion_out_channels=32,
            norm_cfg=BN,
        ),
        head("DepthwiseSeparableFCNHead", 32, -1, concat_input=False),
        [fcn(32, -2), fcn(16, -3)],
    ),
    "ERFNet": segmentor(
        dict(
            type="ERFNet",
            enc_downsample_channels=(8, 16, 32),
            enc_stage_non_bottlenecks=(1, 4),
            enc_non_bottleneck_dilations=(2, 4, 8, 16),
            enc_non_bottleneck_channels=(16, 32),
            dec_upsample_channels=(16, 8),
            dec_stages_non_bottleneck=(2, 2),
            dec_non_bottleneck_channels=(16, 8),
            norm_cfg=BN,
        ),
        fcn(8, -1),
    ),
    "ICNet": segmentor(
        dict(
            type="ICNet",
            backbone_cfg=resnet("ResNetV1c"),
            layer_channels=(16, 64),
            light_branch_middle_channels=8,
            psp_out_channels=32,
            out_channels=(8, 16, 16),
            norm_cfg=BN,
        ),
        fcn(16, 2),
        [fcn(16, 0), fcn(16, 1)],
        neck=dict(type="ICNeck", in_channels=(8, 16, 16), out_channels=16, norm_cfg=BN),
    ),
    "BiSeNetV1": segmentor(
        dict(
            type="BiSeNetV1",
            backbone_cfg=resnet(),
            context_channels=(16, 32, 64),
            spatial_channels=(8, 8, 8, 16),
            out_indices=(0, 1, 2),
            out_channels=32,
            norm_cfg=BN,
        ),
        fcn(32, 0),
        [fcn(16, 1), fcn(16, 2)],
    ),
    "BiSeNetV2": segmentor(
        dict(
            type="BiSeNetV2",
            detail_channels=(8, 8, 16),
            semantic_channels=(4, 8, 8, 16),
            semantic_expansion_ratio=2,
            bga_channels=16,
            norm_cfg=BN,
        ),
        fcn(16, 0),
        [fcn(4, 1), fcn(8, 2), fcn(8, 3), fcn(16, 4)],
    ),
    "STDCNet": segmentor(STDC, fcn(64, 2)),
    "STDCContextPathNet": segmentor(
        dict(
            type="STDCContextPathNet",
            backbone_cfg=STDC,
            last_in_channels=(64, 32),
            out_channels=16,
            ffm_cfg=dict(in_channels=48, out_channels=32, scale_factor=4),
            norm_cfg=BN,
        ),
        fcn(32, 3, sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=100)),
        [fcn(16, 2), fcn(16, 1)],
    ),
    "VisionTransformer": segmentor(vit(), fcn(32)),
    "BEiT": segmentor(
        vit("BEiT", qv_bias=True, init_values=0.1),
        levels("UPerHead", (32,) * 4),
        neck=dict(type="Feature2Pyramid", embed_dim=32, rescales=[4, 2, 1, 0.5], norm_cfg=BN),
    ),
    "MAE": segmentor(
        vit("MAE", init_values=0.1),
        levels("UPerHead", (32,) * 4),
        neck=dict(type="Feature2Pyramid", embed_dim=32, rescales=[4, 2, 1, 0.5], norm_cfg=BN),
    ),
    "SwinTransformer": segmentor(small_swin(), levels("UPerHead"), fcn(32, 2)),
    "MixVisionTransformer": segmentor(
        dict(type="MixVisionTransformer", embed_dims=8, num_layers=[2, 1, 1, 1], num_heads=[1, 2, 4, 8]),
        levels("SegformerHead"),
    ),
    "PCPVT": segmentor(
        pyramid("PCPVT"),
        levels("FPNHead", (16,) * 4, feature_strides=[4, 8, 16, 32]),
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    ),
    "SVT": segmentor(pyramid("SVT", windiow_sizes=[4, 4, 4, 4]), levels("UPerHead")),
    "InternViT6B": segmentor(
        dict(
            type="InternViT6B",
            patch_size=16,
            img_size=CROP,
            pretrain_size=CROP,
            embed_dim=32,
            depth=4,
            num_heads=2,
            with_fpn=True,
            out_indices=[0, 1, 2, 3],
        ),
        levels("UPerHead", (32,) * 4),
    ),
    "InternViTAdapter": segmentor(
        dict(
            type="InternViTAdapter",
            img_size=CROP,
            patch_size=16,
            embed_dim=32,
            depth=4,
            num_heads=2,
            use_flash_attn=False,
            interaction_indexes=[[0, 1], [2, 3]],
            deform_ratio=0.5,
            conv_inplane=8,
            freeze_vit=True,
        ),
        levels("UPerHead", (32,) * 4),
    ),
    "InternImage": segmentor(
        dict(type="InternImage", core_op="DCNv3", channels=8, depths=[1, 1, 2, 1], groups=[1, 2, 4, 4]),
        levels("UPerHead"),
    ),
    "mmcls.ConvNeXt": segmentor(
        dict(
            type="mmcls.ConvNeXt",
            arch=dict(depths=[2, 1, 1, 1], channels=[8, 16, 32, 64]),
            out_indices=[0, 1, 2, 3],
            gap_before_final_norm=False,
        ),
        levels("UPerHead"),
    ),
    "mmcls.SwinTransformer": segmentor(
        dict(
            type="mmcls.SwinTransformer",
            img_size=CROP,
            out_indices=(0, 1, 2, 3),
            window_size=2,
            arch=dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8]),
        ),
        levels("UPerHead"),
    ),
    "mmcls.PoolFormer": segmentor(
        dict(
            type="mmcls.PoolFormer",
            arch=dict(
                layers=[1, 1, 1, 1],
                embed_dims=[8, 16, 32, 64],
                mlp_ratios=[2] * 4,
                layer_scale_init_value=1e-5,
            ),
            in_patch_size=7,
            in_stride=4,
            in_pad=2,
            down_patch_size=3,
            down_stride=2,
            down_pad=1,
            out_indices=(0, 2, 4, 6),
            frozen_stages=0,
        ),
        levels("UPerHead"),
    ),
}
NECKS: dict[str, dict[str, Any]] = {
    "JPU": segmentor(
        resnet(out_indices=(1, 2, 3)),
        fcn(32, 2),
        neck=dict(
            type="JPU",
            in_channels=(16, 32, 64),
            mid_channels=8,
            start_level=0,
            end_level=-1,
            dilations=(1, 2, 4, 8),
            norm_cfg=BN,
        ),
    ),
    "MLANeck": segmentor(
        vit(),
        levels("SETRMLAHead", (16,) * 4, mla_channels=8, channels=32),
        [fcn(16, index, num_convs=0) for index in range(4)],
        neck=dict(type="MLANeck", in_channels=[32] * 4, out_channels=16, norm_cfg=BN),
    ),
    "MultiLevelNeck": segmentor(
        vit(),
        levels("UPerHead", (16,) * 4),
        neck=dict(type="MultiLevelNeck", in_channels=[32] * 4, out_channels=16),
    ),
}
HEADS: dict[str, dict[str, Any]] = {
    "ANNHead": on_resnet(head("ANNHead", [32, 64], [2, 3], project_channels=8)),
    "APCHead": on_resnet(head("APCHead", pool_scales=(1, 2), fusion=True)),
    "ASPPHead": on_resnet(head("ASPPHead", dilations=(1, 2, 3))),
    "CCHead": on_resnet(head("CCHead", recurrence=2)),
    "DAHead": on_resnet(head("DAHead", pam_channels=8)),
    "DMHead": on_resnet(head("DMHead", filter_sizes=(1, 3))),
    "DNLHead": on_resnet(head("DNLHead", reduction=2, use_scale=True, mode="embedded_gaussian")),
    "DPTHead": segmentor(
        vit(output_cls_token=True),
        head(
            "DPTHead",
            [32] * 4,
            [0, 1, 2, 3],
            input_transform="multiple_select",
            embed_dims=32,
            post_process_channels=[8, 16, 32, 32],
        ),
    ),
    "DepthwiseSeparableASPPHead": on_resnet(
        head("DepthwiseSeparableASPPHead", dilations=(1, 2, 3), c1_in_channels=8, c1_channels=4)
    ),
    "DepthwiseSeparableFCNHead": on_resnet(head("DepthwiseSeparableFCNHead", concat_input=False)),
    "EMAHead": on_resnet(head("EMAHead", ema_channels=16, num_bases=8, num_stages=2)),
    "EncHead": on_resnet(
        head("EncHead", [16, 32, 64], [1, 2, 3], num_codes=4, use_se_loss=True, add_lateral=False)
    ),
    "FCNHead": on_resnet(fcn(num_convs=2, concat_input=True)),
    "FPNHead": on_resnet(
        levels("FPNHead", (16,) * 4, feature_strides=[4, 8, 16, 32]),
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    ),
    "GCHead": on_resnet(head("GCHead", ratio=1 / 4)),
    "ISAHead": on_resnet(head("ISAHead", isa_channels=8, down_factor=(2, 2))),
    "IterativeDecodeHead": on_resnet(knet(), fcn(32, 2)),
    "LRASPPHead": segmentor(
        resnet(strides=(1, 1, 1, 1)),
        head(
            "LRASPPHead", (8, 16, 64), (0, 1, 3), input_transform="multiple_select", branch_channels=(8, 16)
        ),
        test_cfg=dict(mode="whole"),
    ),
    "NLHead": on_resnet(head("NLHead", reduction=2, use_scale=True, mode="embedded_gaussian")),
    "OCRHead": cascade(fcn(), head("OCRHead", ocr_channels=16)),
    "PSAHead": on_resnet(head("PSAHead", mask_size=(9, 9), psa_type="bi-direction", shrink_factor=2)),
    "PSPHead": on_resnet(head("PSPHead", pool_scales=(1, 2))),
    "PointHead": cascade(
        levels("FPNHead", (16,) * 4, feature_strides=[4, 8, 16, 32]),
        head("PointHead", [16], [0], num_fcs=1, coarse_pred_each_layer=True, norm_cfg=None),
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
        train_cfg=dict(num_points=64, oversample_ratio=3, importance_sample_ratio=0.75),
        test_cfg=dict(mode="whole", subdivision_steps=1, subdivision_num_points=64, scale_factor=2),
    ),
    "SETRMLAHead": NECKS["MLANeck"],
    "SETRUPHead": segmentor(
        vit(with_cls_token=True),
        head("SETRUPHead", 32, 3, num_convs=2, up_scale=2, kernel_size=3),
        [head("SETRUPHead", 32, index, num_convs=1, up_scale=4, kernel_size=3) for index in range(2)],
    ),
    "STDCHead": segmentor(
        BACKBONES["STDCContextPathNet"]["backbone"],
        fcn(32, 3),
        [
            fcn(16, 2),
            head(
                "STDCHead",
                32,
                0,
                num_convs=1,
                concat_input=False,
                num_classes=2,
                boundary_threshold=0.1,
                loss_decode=[
                    dict(type="CrossEntropyLoss", loss_name="loss_ce", use_sigmoid=True, loss_weight=1.0),
                    dict(type="DiceLoss", loss_name="loss_dice", loss_weight=1.0),
                ],
            ),
        ],
    ),
    "SegformerHead": BACKBONES["MixVisionTransformer"],
    "SegmenterMaskTransformerHead": segmentor(
        vit(),
        head(
            "SegmenterMaskTransformerHead",
            32,
            3,
            channels=32,
            num_layers=2,
            num_heads=2,
            embed_dims=32,
            dropout_ratio=0.0,
            norm_cfg=dict(type="LN"),
        ),
    ),
    "UPerHead": on_resnet(levels("UPerHead")),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ResNet, frozen_stages": segmentor(resnet(frozen_stages=2)),
    "ResNet, norm_eval": segmentor(resnet(norm_eval=True)),
    "ResNet, DCNv2": segmentor(
        resnet(
            depth=50,
            dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
            stage_with_dcn=(False, False, True, True),
        ),
        fcn(256),
    ),
    "ResNet, with_cp": segmentor(resnet(with_cp=True)),
    "SwinTransformer, frozen_stages": segmentor(small_swin(frozen_stages=2), levels("UPerHead")),
    "SwinTransformer, ape": segmentor(small_swin(use_abs_pos_embed=True, with_cp=True), levels("UPerHead")),
    "mmcls.ConvNeXt, frozen_stages": segmentor(
        dict(BACKBONES["mmcls.ConvNeXt"]["backbone"], frozen_stages=1), levels("UPerHead")
    ),
    "PointHead, slide": dict(
        HEADS["PointHead"],
        test_cfg=dict(
            mode="slide",
            crop_size=(CROP, CROP),
            stride=(48, 48),
            subdivision_steps=1,
            subdivision_num_points=64,
            scale_factor=2,
        ),
    ),
}
CASES = {
    f"{kind} {name}": model
    for kind, models in (("backbone", BACKBONES), ("neck", NECKS), ("head", HEADS), ("setting", SETTINGS))
    for name, model in models.items()
}


WORTH_KNOWING = {
    "setting ResNet, DCNv2": "mmcv's compiled operator: sizes are not checked beforehand, it computes in "
    "fp32, and hooks are on layers",
    "head PSAHead": "mmcv's compiled operator: sizes are not checked beforehand, and hooks are on layers",
    "backbone HRNet": "its modules take lists: hooks are on layers",
    "backbone SwinTransformer": "bf16 under torch.autocast, as all backbones that do not say `follows_dtype`",
    "head LRASPPHead": "needs a map of 49 x 49 or more",
}
NOT_RUN = {
    "TIMMBackbone": "needs timm",
    "KernelUpdateHead": "a part of IterativeDecodeHead",
    "KernelUpdator": "a part of that",
}
"""Of mmseg's registry."""
CROPS = {"head LRASPPHead": 224, "backbone ICNet": 128}
"""The first pools 49 x 49 pixels of a map that is a quarter of the image's size. The second halves its image:
a last stage of one pixel would meet torch's bf16 convolution for CPUs, whose gradient of 3 x 3 weights on one
pixel is uninitialised memory at times (torch 2.13)."""


def experiment(model: dict[str, Any], data: Path, crop: int = CROP) -> Config:
    """The demo's data in crops of so many pixels, plain AdamW, STEPS steps and an evaluation."""
    cfg = Config.fromfile(ROOT / "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py")
    scale = (2 * crop, crop)
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="Resize", img_scale=scale),
        dict(type="RandomCrop", crop_size=(crop, crop)),
        dict(type="RandomFlip", prob=0.5),
        dict(type="Normalize", **cfg.img_norm_cfg),
        dict(type="Pad", size=(crop, crop), pad_val=0, seg_pad_val=255),
        dict(type="DefaultFormatBundle"),
        dict(type="Collect", keys=["img", "gt_semantic_seg"]),
    ]
    cfg.data.train.pipeline = pipeline
    cfg.data.val.pipeline[1].img_scale = scale
    for split in ("train", "val", "test"):
        cfg.data[split].data_root = str(data)
    cfg.data.samples_per_gpu, cfg.data.workers_per_gpu = 2, 0
    cfg.model = model
    import mmcls.models  # noqa: F401 - registers its backbones

    cfg.optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.01)
    cfg.optimizer_config = dict(grad_clip=dict(max_norm=1.0))
    cfg.engine = dict(backbone_dtype="bfloat16", peak_tflops=0.4)
    cfg.runner.max_iters = STEPS
    cfg.evaluation.interval = STEPS
    cfg.evaluation.save_best = None
    cfg.log_config = dict(interval=1, hooks=[])
    return cfg


def run(name: str, data: Path, work_dir: Path) -> str:
    """Two steps, an evaluation, and a forward from whole and from partitioned weights; what is wrong, "" for
    nothing. Collective."""
    from internseg_ds import SegmentorEngine
    from internseg_ds.distributed.gathering import forwards

    crop = CROPS.get(name, CROP)
    with SegmentorEngine(
        experiment(CASES[name], data, crop),
        ROOT / "ds_configs/zero3_bf16.json",
        work_dir=work_dir,
        saves=False,
    ) as engine:
        engine.train()
        image, logits = torch.randn(1, 3, crop, crop, generator=torch.Generator().manual_seed(0)), []
        for weights in ("whole", "partitioned"):
            with forwards(
                engine.deepspeed.module,
                engine.plan.experiment.model,
                engine.compute_dtype,
                engine.world.device,
                heads=engine.heads_dtype,
                weights=weights,
            ) as ready:
                logits.append(ready(image, [{}]))
                ready.finish()
    if not torch.allclose(*logits, rtol=1e-2, atol=1e-2):
        return (
            "whole and partitioned weights segment differently, by up to "
            f"{(logits[0] - logits[1]).abs().max():.3g}"
        )
    if dist.get_rank() == 0:
        records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        if len(losses) != STEPS or not all(map(math.isfinite, losses)) or "mIoU" not in records[-1]:
            return f"losses {losses}, and {'a' if 'mIoU' in records[-1] else 'no'} score"
    return ""


def run_all(names: Sequence[str], data: Path, folder: Path) -> None:
    """On each rank: runs the cases in their order and writes what is wrong with NUMBER into
    folder/NUMBER.RANK. Ends at the first that fails, after which the ranks may no longer be in step."""
    os.chdir(ROOT)
    rank = int(os.environ["RANK"])
    with (folder / f"log.{rank}").open("w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    dist.init_process_group("gloo")
    for number, name in enumerate(names):
        try:
            wrong = run(name, data, folder / f"run_{number}")
        except Exception as error:
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        (folder / f"{number}.{rank}").write_text(wrong)
        if wrong:
            os._exit(1)
    dist.barrier()
    os._exit(0)  # without the ends of two processes to wait for


def sweep(names: Sequence[str], data: Path, folder: Path) -> dict[str, str]:
    """What is wrong with each case, "" for nothing, run by as few pairs of processes as there are failures,
    and one."""
    found: dict[str, str] = {}
    while rest := [name for name in names if name not in found]:
        place = folder / f"from_{len(found)}"
        place.mkdir(parents=True)
        ranks = start_ranks(run_all, 2, free_port(), rest, data, place)
        done, since = 0, time.monotonic()
        while all(rank.exitcode is None for rank in ranks) and time.monotonic() - since < LIMIT_S:
            time.sleep(0.05)
            if (now := len(list(place.glob("*.0")))) != done:
                done, since = now, time.monotonic()
        for rank in ranks:
            rank.join(LEAVE_S)
            rank.kill()
            rank.join()
        for number, name in enumerate(rest):
            said = [file.read_text() for file in sorted(place.glob(f"{number}.[01]"))]
            if len(said) < 2 or any(said):
                found[name] = next(filter(None, said), "one process ended or hung, and the other waited")
                break
            found[name] = ""
    return found


def table(found: Mapping[str, str]) -> str:
    """The rows of docs/supported_models.md."""
    rows = [
        "| part | name | two steps and an evaluation under `zero3_bf16` | worth knowing |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        part, name = case.split(" ", 1)
        verdict = "yes" if not found[case] else f"no: {found[case].splitlines()[0][:200]}"
        rows.append(f"| {part} | `{name}` | {verdict} | {WORTH_KNOWING.get(case, '')} |")
    return "\n".join(rows) + "\n"
