"""EoMT on DINOv3's ViT-L/16 (0.32 B parameters), every parameter trained for 40,000 steps: queries join the last
4 blocks, and there is no decoder.

Published score of EoMT-L with DINOv3 at 512 x 512: 59.5 mIoU on ADE20K val, single scale. Not measured here.
Published, too: learning rate and its decay of 0.8 a layer, weight decay, gradients clipped to a norm of 0.01,
batch, crop, 40,000 steps (31 epochs), and when masked attention goes away. Otherwise here: one warmup of 1,500
steps (published: 500 for the head, then 1,000 for the backbone), the last block at 0.8 of the learning rate and
not at all of it, no weight decay of vectors, no random scale of rotary positions, mmseg's augmentation.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 11.0 GiB each, 0.022 s a step, 15 minutes in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/eomt_vit_large_512_40k_ade20k_bs16_lr1e-4.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = [
    "../_base_/models/eomt_dinov3_vit_l.py",
    "../_base_/datasets/ade20k_512x512.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/default_runtime.py",
]
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="Resize", img_scale=(2048, 512), ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=(512, 512), pad_val=0, seg_pad_val=255),
    dict(type="ToMask"),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg", "gt_masks", "gt_labels"]),
]
data = dict(train=dict(pipeline=train_pipeline))
optimizer = dict(lr=1e-4, paramwise_cfg=dict(num_layers=24, layer_decay_rate=0.8))
optimizer_config = dict(grad_clip=dict(max_norm=0.01, norm_type=2))
lr_config = dict(power=0.9)
runner = dict(max_iters=40000)
