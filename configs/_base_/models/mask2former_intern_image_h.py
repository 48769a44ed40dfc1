"""Mask2Former on InternImage-H: 200 queries, 6 layers of deformable attention over three levels, 9 layers of masked attention, all 1024 wide;
ADE20K's 150 classes."""

num_classes = 150
width = 1024
attention = dict(embed_dims=width, num_heads=32)
ffn = dict(embed_dims=width, feedforward_channels=4 * width, num_fcs=2, ffn_drop=0.0, with_cp=False, act_cfg=dict(type="ReLU", inplace=True))
position = dict(type="SinePositionalEncoding", num_feats=width // 2, normalize=True)

model = dict(
    type="EncoderDecoderMask2Former",
    pretrained=None,
    backbone=dict(
        type="InternImage",
        core_op="DCNv3",
        channels=320,
        depths=[6, 6, 32, 6],
        groups=[10, 20, 40, 80],
        mlp_ratio=4.0,
        drop_path_rate=0.5,
        norm_layer="LN",
        layer_scale=None,
        offset_scale=1.0,
        post_norm=False,
        dw_kernel_size=5,
        res_post_norm=True,
        level2_post_norm=True,
        level2_post_norm_block_ids=[5, 11, 17, 23, 29],
        center_feature_scale=True,
        with_cp=False,
        out_indices=(0, 1, 2, 3),
        init_cfg=None,
    ),
    decode_head=dict(
        type="Mask2FormerHead",
        in_channels=[320, 640, 1280, 2560],
        in_index=[0, 1, 2, 3],
        feat_channels=width,
        out_channels=width,
        num_classes=num_classes,
        num_queries=200,
        num_transformer_feat_level=3,
        enforce_decoder_input_project=False,
        pixel_decoder=dict(
            type="MSDeformAttnPixelDecoder",
            num_outs=3,
            norm_cfg=dict(type="GN", num_groups=32),
            act_cfg=dict(type="ReLU"),
            encoder=dict(
                type="DetrTransformerEncoder",
                num_layers=6,
                transformerlayers=dict(
                    type="BaseTransformerLayer",
                    attn_cfgs=dict(
                        type="MultiScaleDeformableAttention", **attention, num_levels=3, num_points=4, im2col_step=64, dropout=0.0, batch_first=False,
                        norm_cfg=None, init_cfg=None,
                    ),
                    ffn_cfgs=dict(type="FFN", **ffn),
                    operation_order=("self_attn", "norm", "ffn", "norm"),
                ),
                init_cfg=None,
            ),
            positional_encoding=position,
            init_cfg=None,
        ),
        positional_encoding=position,
        transformer_decoder=dict(
            type="DetrTransformerDecoder",
            return_intermediate=True,
            num_layers=9,
            transformerlayers=dict(
                type="DetrTransformerDecoderLayer",
                attn_cfgs=dict(type="MultiheadAttention", **attention, attn_drop=0.0, proj_drop=0.0, dropout_layer=None, batch_first=False),
                ffn_cfgs=dict(**ffn, dropout_layer=None, add_identity=True),
                feedforward_channels=4 * width,
                operation_order=("cross_attn", "norm", "self_attn", "norm", "ffn", "norm"),
            ),
            init_cfg=None,
        ),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=2.0, reduction="mean", class_weight=[1.0] * num_classes + [0.1]),
        loss_mask=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=5.0, reduction="mean"),
        loss_dice=dict(type="DiceLoss", use_sigmoid=True, activate=True, naive_dice=True, eps=1.0, loss_weight=5.0, reduction="mean"),
    ),
    train_cfg=dict(
        num_points=12544,
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
    test_cfg=dict(mode="whole"),
)
