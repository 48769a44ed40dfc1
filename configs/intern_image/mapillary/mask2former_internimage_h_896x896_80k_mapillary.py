"""Mask2Former on InternImage-H, every parameter trained for 80,000 steps on Mapillary Vistas with the 19
classes of Cityscapes: where mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes.py starts.

Published score: none.
1.09 B parameters. Global batch: 32 images = 16 GPUs x 2; other numbers of GPUs accumulate gradients up to
it. 16 GPUs x 2 divide the losses of masks by the masks of the whole step, fewer GPUs by those of a
micro-batch, so their losses are not quite the same.

    deepspeed launch/train.py configs/intern_image/mapillary/mask2former_internimage_h_896x896_80k_mapillary.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/mask2former_intern_image_h_256.py",
    "../../_base_/datasets/mapillary_as_cityscapes_896x896_masks.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
engine = dict(global_batch=32)
num_classes = 19
model = dict(
    backbone=dict(
        init_cfg=dict(type="Pretrained", checkpoint="./pretrained/internimage_h_jointto22k_384.pth")
    ),
    decode_head=dict(
        num_classes=num_classes,
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
    ),
    test_cfg=dict(mode="slide", crop_size=(896, 896), stride=(512, 512)),
)
optimizer = dict(
    lr=2e-5,
    paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
)
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
runner = dict(max_iters=80000)
evaluation = dict(interval=2000)
