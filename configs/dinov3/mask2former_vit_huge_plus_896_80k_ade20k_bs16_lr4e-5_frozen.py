"""Head tuning: Mask2Former and the pyramid under it trained for 80,000 steps on a frozen DINOv3 ViT-H+/16, crops
of 896 pixels.

No score is published, and none was measured here. All else as in the full tuning.
Global batch: 16 images = 16 GPUs x 1; other numbers of GPUs accumulate gradients up to it, and then divide the
losses of masks by the masks of a micro-batch.
Planned for 8 H100 of 80 GB: 52.3 GiB each, 0.15 s a step, 3.3 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/mask2former_vit_huge_plus_896_80k_ade20k_bs16_lr4e-5_frozen.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = ["mask2former_vit_huge_plus_896_80k_ade20k_bs16_lr4e-5.py"]
model = dict(backbone=dict(freeze=True, drop_path_rate=0.0))
optimizer = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
