"""Mask2Former on InternImage-H, every parameter trained for 40,000 steps on COCO-Stuff-10k, from a model that
was trained on COCO-Stuff-164k.

Published score: 59.2 mIoU on COCO-Stuff-10k test, single scale (59.6 multi-scale).
1.31 B parameters (1.28 B by OpenGVLab's count). Global batch: 16 images = 16 GPUs x 1; other numbers of
GPUs accumulate gradients up to it. 16 GPUs x 1 divide the losses of masks by the masks of the whole step,
fewer GPUs by those of a micro-batch, so their losses are not quite the same.

The 1,000 test images of COCO-Stuff-10k are images of COCO's training part, so COCO-Stuff-164k, where the
weights come from, may hold them.

    deepspeed launch/train.py configs/intern_image/coco_stuff10k/mask2former_internimage_h_512_40k_cocostuff164k_to_10k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/mask2former_intern_image_h.py",
    "../../_base_/datasets/coco_stuff10k_512x512.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
load_from = "./pretrained/mask2former_internimage_h_896_80k_cocostuff164k.pth"
num_classes = 171
model = dict(
    decode_head=dict(
        num_classes=num_classes,
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
    ),
)
data = dict(samples_per_gpu=1, train=dict(pipeline={{_base_.train_pipelines.from_1_masks}}))
optimizer = dict(
    lr=1e-5,
    paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
)
runner = dict(max_iters=40000)
evaluation = dict(interval=2000)
