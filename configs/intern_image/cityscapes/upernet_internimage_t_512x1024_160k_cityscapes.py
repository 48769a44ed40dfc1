"""UPerNet on InternImage-T, every parameter trained for 160,000 steps on Cityscapes.

Published score: 82.58 mIoU on Cityscapes val, single scale (83.4 multi-scale:
upernet_internimage_t_512x1024_160k_cityscapes_ms.py); 59 M parameters. Global batch: 16 images = 8 GPUs x 2;
other numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_image/cityscapes/upernet_internimage_t_512x1024_160k_cityscapes.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = [
    "../../_base_/models/upernet_intern_image.py",
    "../../_base_/datasets/cityscapes_512x1024.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_t_1k_224.pth"),
    ),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
)
