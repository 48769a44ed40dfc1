"""Head tuning: UPerNet and the pyramid under it trained for 80,000 steps on a frozen DINOv3 ViT-7B/16.

No score is published, and none was measured here. All else as in the full tuning of
upernet_vit_7b_512_80k_ade20k_bs16_lr4e-5.py, to compare with it.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 30.8 GiB each, 0.19 s a step, 4.3 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/upernet_vit_7b_512_80k_ade20k_bs16_lr4e-5_frozen.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["upernet_vit_7b_512_80k_ade20k_bs16_lr4e-5.py"]
model = dict(backbone=dict(freeze=True, drop_path_rate=0.0))
optimizer = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
