"""SegFormer's head on InternImage-L, every parameter trained for 160,000 steps on Cityscapes with its coarse
images, from a model that was trained on Mapillary Vistas.

Published score: 85.16 mIoU on Cityscapes val, single scale (85.67 multi-scale).
220 M parameters. Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
OpenGVLab's Mapillary weights score 150 classes of which 19 were trained: the layer that scores them starts
from initial values.

    deepspeed launch/train.py configs/intern_image/cityscapes/segformer_internimage_l_512x1024_160k_mapillary2cityscapes.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = [
    "../../_base_/models/segformer_intern_image.py",
    "../../_base_/datasets/cityscapes_extra_512x1024.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
engine = dict(weights_may_differ=["decode_head.conv_seg."])
load_from = "./pretrained/segformer_internimage_l_512x1024_80k_mapillary.pth"
model = dict(
    backbone=dict(
        channels=160,
        depths=[5, 5, 22, 5],
        groups=[10, 20, 40, 80],
        drop_path_rate=0.4,
        offset_scale=2.0,
        post_norm=True,
    ),
    decode_head=dict(in_channels=[160, 320, 640, 1280], num_classes=19),
)
optimizer = dict(
    lr=2e-5,
    paramwise_cfg=dict(num_layers=37, layer_decay_rate=0.94, depths=[5, 5, 22, 5], offset_lr_scale=1.0),
)
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
evaluation = dict(interval=4000)
