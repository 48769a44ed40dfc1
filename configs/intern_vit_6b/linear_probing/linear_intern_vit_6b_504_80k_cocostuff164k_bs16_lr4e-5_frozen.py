"""Linear probing: batch norm and one linear classifier trained for 80,000 steps on block 45 of a frozen
InternViT-6B, on COCO-Stuff-164k.

Published score: none; the file is InternVL-MMDetSeg's, with its values.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_vit_6b/linear_probing/linear_intern_vit_6b_504_80k_cocostuff164k_bs16_lr4e-5_frozen.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/linear_intern_vit_6b.py",
    "../../_base_/datasets/coco_stuff164k_504x504.py",
    "../../_base_/schedules/adamw_80k.py",
    "../../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(freeze_vit=True, out_indices=[44]),
    decode_head=dict(num_classes=171),
)
optimizer = dict(weight_decay=0.0, paramwise_cfg=dict(layer_decay_rate=1.0))
