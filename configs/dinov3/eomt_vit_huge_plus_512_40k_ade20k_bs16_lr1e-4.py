"""EoMT on DINOv3's ViT-H+/16 (0.86 B parameters), every parameter trained for 40,000 steps: queries join the last
5 of 32 blocks.

No score is published, and none was measured here. The recipe is that of EoMT-L; 5 blocks are what is published
for ViT-g of 40 blocks.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 17.6 GiB each, 0.049 s a step, 33 minutes in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/eomt_vit_huge_plus_512_40k_ade20k_bs16_lr1e-4.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = ["eomt_vit_large_512_40k_ade20k_bs16_lr1e-4.py"]
model = dict(
    backbone=dict(
        model_name="vit_huge_plus_patch16_dinov3",
        out_indices=[31],
        pretrained="./pretrained/vit_huge_plus_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(num_blocks=5),
)
optimizer = dict(paramwise_cfg=dict(num_layers=32))
