"""Full tuning: UPerNet on DINOv3's ViT-7B/16, every parameter trained for 80,000 steps.

No score of a fully tuned DINOv3-7B on ADE20K is published, and none was measured here. The recipe is that of
InternViT-6B's full tuning, a model of the same size: learning rate 4e-5 with a decay of 0.95 per block, drop
path 0.4. What is published: 55.9 mIoU by a linear classifier on the frozen model (`linear_vit_7b_...`).
DINOv3's authors advise to begin with the frozen model.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 41.8 GiB each, 0.33 s a step, 7.4 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/upernet_vit_7b_512_80k_ade20k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../_base_/models/upernet_dinov3_vit_7b.py",
    "../_base_/datasets/ade20k_512x512.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(backbone=dict(drop_path_rate=0.4))
optimizer = dict(paramwise_cfg=dict(num_layers=40))
