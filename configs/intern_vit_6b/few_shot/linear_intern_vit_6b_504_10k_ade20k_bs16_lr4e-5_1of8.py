"""Few-shot: InternViT-6B with a linear classifier, every parameter trained for 10,000 steps on 1/8 of
ADE20K's training images.

Published score: 50.0 mIoU on ADE20K val, single scale.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_vit_6b/few_shot/linear_intern_vit_6b_504_10k_ade20k_bs16_lr4e-5_1of8.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/linear_intern_vit_6b.py",
    "../../_base_/datasets/ade20k_504x504_few_shot.py",
    "../../_base_/schedules/adamw_80k.py",
    "../../_base_/default_runtime.py",
]
model = dict(backbone=dict(drop_path_rate=0.4))
# drawn by a seed: the same images on all ranks and in every restart
data = dict(train=dict(max_image_num=20210 // 8))
lr_config = dict(warmup_iters=200)
runner = dict(max_iters=10000)
