"""Mask2Former on InternImage-H, every parameter trained for 80,000 steps on COCO-Stuff-164k: where the
experiments on ADE20K and COCO-Stuff-10k start.

Published score: 52.6 mIoU on COCO-Stuff-164k val, single scale.
1.31 B parameters. Global batch: 16 images = 16 GPUs x 1; other numbers of GPUs accumulate gradients up to
it. 16 GPUs x 1 divide the losses of masks by the masks of the whole step, fewer GPUs by those of a
micro-batch, so their losses are not quite the same.

    deepspeed launch/train.py configs/intern_image/coco_stuff164k/mask2former_internimage_h_896_80k_cocostuff164k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/mask2former_intern_image_h.py",
    "../../_base_/datasets/coco_stuff164k_896x896.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
num_classes = 171
model = dict(
    backbone=dict(
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_h_jointto22k_384.pth")
    ),
    decode_head=dict(
        num_classes=num_classes,
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
    ),
)
data = dict(samples_per_gpu=1, train=dict(pipeline={{_base_.train_pipelines.from_0_masks}}))
optimizer = dict(
    lr=2e-5,
    paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
)
runner = dict(max_iters=80000)
evaluation = dict(interval=8000)
