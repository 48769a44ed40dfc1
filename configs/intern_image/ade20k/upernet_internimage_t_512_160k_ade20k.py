"""UPerNet on InternImage-T, every parameter trained for 160,000 steps on ADE20K.

Published score: 47.9 mIoU on ADE20K val, single scale (48.1 multi-scale:
upernet_internimage_t_512_160k_ade20k_ms.py); 59 M parameters. Global batch: 16 images = 8 GPUs x 2; other
numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_image/ade20k/upernet_internimage_t_512_160k_ade20k.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = [
    "../../_base_/models/upernet_intern_image.py",
    "../../_base_/datasets/ade20k_512x512.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_t_1k_224.pth"),
    ),
)
