"""Full tuning: UPerNet on InternViT-6B, every parameter trained for 80,000 steps on COCO-Stuff-164k.

Published score: none; the file is InternVL-MMDetSeg's, with its values.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_cocostuff164k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/upernet_intern_vit_6b.py",
    "../../_base_/datasets/coco_stuff164k_504x504.py",
    "../../_base_/schedules/adamw_80k.py",
    "../../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(drop_path_rate=0.4),
    decode_head=dict(num_classes=171),
    auxiliary_head=dict(num_classes=171),
)
