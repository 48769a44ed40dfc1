"""Mask2Former on InternImage-H, every parameter trained for 40,000 steps on Pascal Context with 59 classes.

Published score: 69.7 mIoU on Pascal Context val, 59 classes, single scale (70.3 multi-scale).
1.09 B parameters (1.07 B by OpenGVLab's count). Global batch: 16 images = 16 GPUs x 1; other numbers of
GPUs accumulate gradients up to it. 16 GPUs x 1 divide the losses of masks by the masks of the whole step,
fewer GPUs by those of a micro-batch, so their losses are not quite the same.

    deepspeed launch/train.py configs/intern_image/pascal_context/mask2former_internimage_h_480_40k_pascal_context_59.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/mask2former_intern_image_h_256.py",
    "../../_base_/datasets/pascal_context_59_480x480.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
num_classes = 59
model = dict(
    backbone=dict(
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_h_jointto22k_384.pth")
    ),
    decode_head=dict(
        num_classes=num_classes,
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
    ),
)
data = dict(samples_per_gpu=1, train=dict(pipeline={{_base_.train_pipelines.from_1_masks}}))
optimizer = dict(
    lr=2e-5,
    paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
)
runner = dict(max_iters=40000)
evaluation = dict(interval=2000)
