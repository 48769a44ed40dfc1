"""ViT-Adapter: the adapter and UPerNet trained for 80,000 steps around a frozen InternViT-6B.

Published score (InternVL-MMDetSeg): 58.1 mIoU on ADE20K val, single scale.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
All parameters train with model.backbone.freeze_vit=False.

    deepspeed launch/train.py configs/intern_vit_6b/vit_adapter/upernet_intern_vit_adapter_6b_512_80k_ade20k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/upernet_intern_vit_6b.py",
    "../../_base_/datasets/ade20k_512x512.py",
    "../../_base_/schedules/adamw_80k.py",
    "../../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        type="InternViTAdapter",
        img_size=512,
        patch_size=16,
        init_values=0.0,
        with_fpn=False,
        freeze_vit=True,
        out_indices=[0, 1, 2, 3],
        use_final_norm=True,
        interaction_indexes=[[0, 11], [12, 23], [24, 35], [36, 47]],
        cffn_ratio=0.25,
        deform_ratio=0.25,
    ),
    test_cfg=dict(crop_size=(512, 512), stride=(341, 341)),
)
# the short side of an evaluated image becomes at least 512, and windows slide over it
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(2048, 512),
        flip=False,
        transforms=[
            dict(type="SETR_Resize", keep_ratio=True, crop_size=(512, 512), setr_multi_scale=True),
            dict(type="RandomFlip"),
            dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(val=dict(pipeline=test_pipeline), test=dict(pipeline=test_pipeline))
