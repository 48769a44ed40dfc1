"""Full tuning: Mask2Former on DINOv3's ViT-H+/16 (0.84 B parameters), every parameter trained for 80,000 steps
on crops of 896 pixels.

No score is published, and none was measured here. The recipe is that of the 7B model.
Global batch: 16 images = 16 GPUs x 1; other numbers of GPUs accumulate gradients up to it, and then divide the
losses of masks by the masks of a micro-batch.
Planned for 8 H100 of 80 GB: 53.5 GiB each, 0.22 s a step, 4.8 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/mask2former_vit_huge_plus_896_80k_ade20k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = ["mask2former_vit_7b_896_80k_ade20k_bs16_lr4e-5.py"]
model = dict(
    backbone=dict(
        model_name="vit_huge_plus_patch16_dinov3",
        out_indices=[7, 15, 23, 31],
        pretrained="./pretrained/vit_huge_plus_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(in_channels=[1280, 1280, 1280, 1280]),
)
optimizer = dict(paramwise_cfg=dict(num_layers=32))
