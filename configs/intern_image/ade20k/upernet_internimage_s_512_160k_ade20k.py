"""UPerNet on InternImage-S, every parameter trained for 160,000 steps on ADE20K.

Published score: 50.1 mIoU on ADE20K val, single scale (50.9 multi-scale:
upernet_internimage_s_512_160k_ade20k_ms.py); 80 M parameters. Global batch: 16 images = 8 GPUs x 2; other
numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_image/ade20k/upernet_internimage_s_512_160k_ade20k.py \
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
        channels=80,
        depths=[4, 4, 21, 4],
        groups=[5, 10, 20, 40],
        drop_path_rate=0.3,
        post_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_s_1k_224.pth"),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
optimizer = dict(paramwise_cfg=dict(num_layers=33, depths=[4, 4, 21, 4]))
