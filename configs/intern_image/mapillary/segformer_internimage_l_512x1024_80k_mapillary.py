"""SegFormer's head on InternImage-L, every parameter trained for 80,000 steps on Mapillary Vistas with the 19
classes of Cityscapes: where segformer_internimage_l_512x1024_160k_mapillary2cityscapes.py starts.

Published score: none.
220 M parameters. Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.

    deepspeed launch/train.py configs/intern_image/mapillary/segformer_internimage_l_512x1024_80k_mapillary.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = [
    "../../_base_/models/segformer_intern_image.py",
    "../../_base_/datasets/mapillary_as_cityscapes_512x1024.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        channels=160,
        depths=[5, 5, 22, 5],
        groups=[10, 20, 40, 80],
        drop_path_rate=0.4,
        offset_scale=2.0,
        post_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_l_22k_192to384.pth"),
    ),
    decode_head=dict(in_channels=[160, 320, 640, 1280], num_classes=19),
)
optimizer = dict(
    lr=2e-5,
    paramwise_cfg=dict(num_layers=37, layer_decay_rate=0.94, depths=[5, 5, 22, 5], offset_lr_scale=1.0),
)
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
runner = dict(max_iters=80000)
evaluation = dict(interval=8000)
