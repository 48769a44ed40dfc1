"""UPerNet on InternImage-H, every parameter trained for 160,000 steps on ADE20K.

Published score: 59.9 mIoU on ADE20K val, single scale (60.3 multi-scale:
upernet_internimage_h_896_160k_ade20k_ms.py); 1.12 B parameters. Global batch: 16 images = 16 GPUs x 1; other
numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_image/ade20k/upernet_internimage_h_896_160k_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/upernet_intern_image.py",
    "../../_base_/datasets/ade20k_896x896.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        channels=320,
        depths=[6, 6, 32, 6],
        groups=[10, 20, 40, 80],
        drop_path_rate=0.5,
        layer_scale=None,
        dw_kernel_size=5,
        res_post_norm=True,
        level2_post_norm=True,
        level2_post_norm_block_ids=[5, 11, 17, 23, 29],
        center_feature_scale=True,
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_h_jointto22k_384.pth"),
    ),
    decode_head=dict(in_channels=[320, 640, 1280, 2560]),
    auxiliary_head=dict(in_channels=1280),
)
optimizer = dict(
    lr=2e-5,
    paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
)
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
data = dict(samples_per_gpu=1)
