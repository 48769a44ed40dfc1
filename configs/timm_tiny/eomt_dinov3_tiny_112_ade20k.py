"""EoMT on a tiny DINOv3 of timm (0.3 M parameters), trained from scratch on images in ADE20K's layout: queries
join the last 2 of 4 blocks.

Data, augmentation and schedule are those of the Mask2Former demo, whose losses are the same. No score is
published. Global batch: 8 images = 2 processes x 4; other numbers of processes accumulate gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/timm_tiny/eomt_dinov3_tiny_112_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../intern_vit_tiny/mask2former_intern_vit_tiny_112_ade20k.py"]

model = dict(
    type="EoMT",
    backbone=dict(
        _delete_=True,
        type="TimmBackbone",
        model_name="vit_small_patch16_dinov3",
        model_args=dict(embed_dim=64, depth=4, num_heads=4, init_values=1.0),
        out_indices=[3],
        final_norm=True,
        drop_path_rate=0.1,
        with_cp=True,
        pretrained=None,
    ),
    decode_head=dict(
        _delete_=True,
        type="EoMTHead",
        num_classes=150,
        num_queries=50,
        num_blocks=2,
        loss_cls=dict(
            type="CrossEntropyLoss",
            use_sigmoid=False,
            loss_weight=2.0,
            reduction="mean",
            class_weight=[1.0] * 150 + [0.1],
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
    test_cfg=dict(crop_size=(112, 112), stride=(80, 80)),
)
optimizer = dict(paramwise_cfg=dict(num_layers=4, layer_decay_rate=0.9))
