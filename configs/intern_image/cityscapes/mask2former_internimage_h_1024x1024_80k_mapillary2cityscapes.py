"""Mask2Former on InternImage-H, every parameter trained for 80,000 steps on Cityscapes with its coarse images,
from a model that was trained on Mapillary Vistas.

Published score: 86.37 mIoU on Cityscapes val, single scale (86.96 multi-scale).
1.09 B parameters. Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to
it. 8 GPUs x 2 divide the losses of masks by the masks of the whole step, fewer GPUs by those of a
micro-batch, so their losses are not quite the same.

    deepspeed launch/train.py configs/intern_image/cityscapes/mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/mask2former_intern_image_h_256.py",
    "../../_base_/datasets/cityscapes_extra_1024x1024.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
load_from = "./pretrained/mask2former_internimage_h_896x896_80k_mapillary.pth"
num_classes = 19
model = dict(
    decode_head=dict(
        num_classes=num_classes,
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
    ),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(512, 512)),
)
data = dict(samples_per_gpu=2, train=dict(pipeline={{_base_.train_pipelines.from_0_masks}}))
optimizer = dict(
    lr=1e-5,
    paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
)
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
runner = dict(max_iters=80000)
evaluation = dict(interval=2000)
