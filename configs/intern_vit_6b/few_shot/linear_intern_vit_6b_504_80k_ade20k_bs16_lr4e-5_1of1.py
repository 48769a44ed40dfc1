"""The few-shot series' last: InternViT-6B with a linear classifier, every parameter trained for 80,000 steps
on all of ADE20K.

Published score: 57.2 mIoU on ADE20K val, single scale.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_vit_6b/few_shot/linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_1of1.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/linear_intern_vit_6b.py",
    "../../_base_/datasets/ade20k_504x504.py",
    "../../_base_/schedules/adamw_80k.py",
    "../../_base_/default_runtime.py",
]
model = dict(backbone=dict(drop_path_rate=0.4))
