"""EoMT on DINOv3's ViT-L/16: 100 queries join the last 4 of 24 blocks; ADE20K's 150 classes.

The backbone's pretrained weights: Meta's, in timm's layout (`vit_large_patch16_dinov3` of the Hugging Face
hub, LVD-1689M). They are under the DINOv3 License, which has terms of use: read it before you train with
them.
"""

num_classes = 150

model = dict(
    type="EoMT",
    pretrained=None,
    backbone=dict(
        type="TimmBackbone",
        model_name="vit_large_patch16_dinov3",
        out_indices=[23],
        final_norm=True,
        with_cp=False,
        pretrained="./pretrained/vit_large_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(
        type="EoMTHead",
        num_classes=num_classes,
        num_queries=100,
        num_blocks=4,
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
    ),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
