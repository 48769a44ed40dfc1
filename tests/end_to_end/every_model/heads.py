"""A tiny segmentor around each decode head of mmseg's registry, by its name there."""

from typing import Any

from tests.end_to_end.every_model.backbones import BACKBONES, NECKS
from tests.end_to_end.every_model.parts import (
    cascade,
    fcn,
    head,
    knet,
    levels,
    on_resnet,
    resnet,
    segmentor,
    vit,
)

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
