"""Linear probing: batch norm and one linear classifier trained for 40,000 steps on the last block of a frozen
DINOv3 ViT-H+/16, behind the model's last norm.

The settings are those of the 7B model's linear probing. Not measured here.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 6.5 GiB each, 0.01 s a step, 6 minutes in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/linear_vit_huge_plus_512_40k_ade20k_bs16_lr1e-3_frozen.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = ["linear_vit_7b_512_40k_ade20k_bs16_lr1e-3_frozen.py"]
model = dict(
    backbone=dict(
        model_name="vit_huge_plus_patch16_dinov3",
        out_indices=[31],
        pretrained="./pretrained/vit_huge_plus_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(in_channels=1280, channels=1280),
)
optimizer = dict(paramwise_cfg=dict(num_layers=32))
