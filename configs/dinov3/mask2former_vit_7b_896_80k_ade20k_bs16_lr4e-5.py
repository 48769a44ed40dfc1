"""Full tuning: Mask2Former on DINOv3's ViT-7B/16, every parameter trained for 80,000 steps on crops of 896
pixels.

No score of this model is published, and none was measured here; 63.0 mIoU are published for a frozen
DINOv3-7B under ViT-Adapter and Mask2Former that was first trained on COCO-Stuff, several scales. Learning
rates as in the full tuning with UPerNet, gradients clipped to 0.1 as InternImage-H's.
Global batch: 16 images = 16 GPUs x 1; other numbers of GPUs accumulate gradients up to it, and then divide the
losses of masks by the masks of a micro-batch.
Planned for 8 H100 of 80 GB: 66.7 GiB each, 0.82 s a step, 18.3 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/mask2former_vit_7b_896_80k_ade20k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../_base_/models/mask2former_dinov3_vit_7b.py",
    "../_base_/datasets/ade20k_896x896_masks.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(backbone=dict(drop_path_rate=0.4))
data = dict(samples_per_gpu=1)
optimizer = dict(paramwise_cfg=dict(num_layers=40))
optimizer_config = dict(grad_clip=dict(max_norm=0.1, norm_type=2))
evaluation = dict(interval=2000)
