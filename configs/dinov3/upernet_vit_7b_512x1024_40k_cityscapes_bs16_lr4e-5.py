"""Full tuning: UPerNet on DINOv3's ViT-7B/16, every parameter trained for 40,000 steps on Cityscapes.

No score is published, and none was measured here. Learning rates as on ADE20K; crops and steps as is common
on Cityscapes.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 56.5 GiB each, 0.67 s a step, 7.4 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/upernet_vit_7b_512x1024_40k_cityscapes_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../_base_/models/upernet_dinov3_vit_7b.py",
    "../_base_/datasets/cityscapes_512x1024.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(drop_path_rate=0.4),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(crop_size=(512, 1024), stride=(341, 683)),
)
runner = dict(max_iters=40000)
optimizer = dict(paramwise_cfg=dict(num_layers=40))
