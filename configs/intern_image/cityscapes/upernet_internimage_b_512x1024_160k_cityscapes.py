"""UPerNet on InternImage-B, every parameter trained for 160,000 steps on Cityscapes.

Published score: 83.18 mIoU on Cityscapes val, single scale (83.97 multi-scale:
upernet_internimage_b_512x1024_160k_cityscapes_ms.py); 128 M parameters. Global batch: 16 images = 8 GPUs x 2;
other numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_image/cityscapes/upernet_internimage_b_512x1024_160k_cityscapes.py \
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
        channels=112,
        depths=[4, 4, 21, 4],
        groups=[7, 14, 28, 56],
        drop_path_rate=0.4,
        post_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_b_1k_224.pth"),
    ),
    decode_head=dict(in_channels=[112, 224, 448, 896], num_classes=19),
    auxiliary_head=dict(in_channels=448, num_classes=19),
)
optimizer = dict(paramwise_cfg=dict(num_layers=33, depths=[4, 4, 21, 4]))
