"""A tiny segmentor around each backbone, and around each neck, of mmseg's registry, by its name there."""

from typing import Any

from tests.end_to_end.every_model.parts import (
    BN,
    CROP,
    fcn,
    head,
    levels,
    on_resnet,
    pyramid,
    resnet,
    segmentor,
    small_swin,
    vit,
)

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
