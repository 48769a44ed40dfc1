"""Mask2Former on InternImage-H, every parameter trained for 80,000 steps on ADE20K, from a model that was
trained on COCO-Stuff-164k.

Published score: 62.6 mIoU on ADE20K val, single scale (62.9 multi-scale:
mask2former_internimage_h_896_80k_cocostuff2ade20k_ms.py); 1.31 B parameters. Global batch: 16 images = 16
GPUs x 1; other numbers of GPUs accumulate gradients up to it. 16 GPUs x 1 divide the losses of masks by the
masks of the whole step, fewer GPUs by those of a micro-batch, so their losses are not quite the same. The
classes of COCO-Stuff are not ADE20K's: the layer that scores them starts from initial values.

    deepspeed launch/train.py configs/intern_image/ade20k/mask2former_internimage_h_896_80k_cocostuff2ade20k_ss.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../../_base_/models/mask2former_intern_image_h.py",
    "../../_base_/datasets/ade20k_896x896_masks.py",
    "../../_base_/schedules/adamw_160k.py",
    "../../_base_/default_runtime.py",
]
engine = dict(weights_may_differ=["decode_head.cls_embed."])  # 171 classes in the file
load_from = "./pretrained/mask2former_internimage_h_896_80k_cocostuff164k.pth"
data = dict(samples_per_gpu=1)
optimizer = dict(
    lr=1e-5,
    paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
)
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
runner = dict(max_iters=80000)
evaluation = dict(interval=2000)
