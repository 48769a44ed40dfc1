"""Full tuning: UPerNet on DINOv3's ViT-H+/16 (0.84 B parameters), every parameter trained for 80,000 steps on
COCO-Stuff-164k.

No score is published, and none was measured here. The recipe is that of ADE20K.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 18.3 GiB each, 0.14 s a step, 3.2 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/upernet_vit_huge_plus_512_80k_cocostuff164k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = ["upernet_vit_7b_512_80k_cocostuff164k_bs16_lr4e-5.py"]
model = dict(
    backbone=dict(
        model_name="vit_huge_plus_patch16_dinov3",
        out_indices=[7, 15, 23, 31],
        pretrained="./pretrained/vit_huge_plus_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(in_channels=[1280, 1280, 1280, 1280]),
    auxiliary_head=dict(in_channels=1280),
)
optimizer = dict(paramwise_cfg=dict(num_layers=32))
