"""Mask2Former on the tiny InternViT: every part of the published head (deformable attention, masked
attention, Hungarian matching, point sampling), small.

Data, augmentation and batch of upernet_intern_vit_tiny_112_ade20k.py, which trains on images in ADE20K's
layout. No score is published.

    deepspeed --num_gpus 2 launch/train.py configs/intern_vit_tiny/mask2former_intern_vit_tiny_112_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["./upernet_intern_vit_tiny_112_ade20k.py"]

# model
num_classes = 150
width = 64
attention = dict(embed_dims=width, num_heads=4)
ffn = dict(
    embed_dims=width,
    feedforward_channels=4 * width,
    num_fcs=2,
    ffn_drop=0.0,
    act_cfg=dict(type="ReLU", inplace=True),
)
position = dict(type="SinePositionalEncoding", num_feats=width // 2, normalize=True)
model = dict(
    type="EncoderDecoderMask2Former",
    decode_head=dict(
        _delete_=True,
        type="Mask2FormerHead",
        in_channels=[128, 128, 128, 128],
        in_index=[0, 1, 2, 3],
        feat_channels=width,
        out_channels=width,
        num_classes=num_classes,
        num_queries=50,
        num_transformer_feat_level=3,
        pixel_decoder=dict(
            type="MSDeformAttnPixelDecoder",
            num_outs=3,
            norm_cfg=dict(type="GN", num_groups=8),
            act_cfg=dict(type="ReLU"),
            encoder=dict(
                type="DetrTransformerEncoder",
                num_layers=2,
                transformerlayers=dict(
                    type="BaseTransformerLayer",
                    attn_cfgs=dict(
                        type="MultiScaleDeformableAttention",
                        num_levels=3,
                        num_points=4,
                        dropout=0.0,
                        **attention,
                    ),
                    ffn_cfgs=dict(type="FFN", **ffn),
                    operation_order=("self_attn", "norm", "ffn", "norm"),
                ),
            ),
            positional_encoding=position,
        ),
        positional_encoding=position,
        transformer_decoder=dict(
            type="DetrTransformerDecoder",
            return_intermediate=True,
            num_layers=3,
            transformerlayers=dict(
                type="DetrTransformerDecoderLayer",
                attn_cfgs=dict(type="MultiheadAttention", attn_drop=0.0, proj_drop=0.0, **attention),
                ffn_cfgs=dict(add_identity=True, **ffn),
                feedforward_channels=4 * width,
                operation_order=("cross_attn", "norm", "self_attn", "norm", "ffn", "norm"),
            ),
        ),
        loss_cls=dict(
            type="CrossEntropyLoss",
            use_sigmoid=False,
            loss_weight=2.0,
            reduction="mean",
            class_weight=[1.0] * num_classes + [0.1],
        ),
        loss_mask=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=5.0, reduction="mean"),
        loss_dice=dict(
            type="DiceLoss",
            use_sigmoid=True,
            activate=True,
            naive_dice=True,
            eps=1.0,
            loss_weight=5.0,
            reduction="mean",
        ),
    ),
    auxiliary_head=None,
    train_cfg=dict(
        num_points=1024,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        assigner=dict(
            type="MaskHungarianAssigner",
            cls_cost=dict(type="ClassificationCost", weight=2.0),
            mask_cost=dict(type="CrossEntropyLossCost", weight=5.0, use_sigmoid=True),
            dice_cost=dict(type="DiceCost", weight=5.0, pred_act=True, eps=1.0),
        ),
        sampler=dict(type="MaskPseudoSampler"),
    ),
)

# data
crop_size = (112, 112)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="Resize", img_scale=(448, 112), ratio_range=(0.75, 1.5)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
    dict(type="ToMask"),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg", "gt_masks", "gt_labels"]),
]
data = dict(train=dict(pipeline=train_pipeline))

# schedule
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
