"""Full tuning: UPerNet on Sapiens2's ViT-5B/16 (5.07 B parameters), every parameter trained for 80,000 steps.

No score is published, and none was measured here. The recipe is that of InternViT-6B's full tuning. The
weights, Meta's in timm's layout (`vit_5b_patch16_sapiens2` of the Hugging Face hub), were pretrained on
images of people. They are under the Sapiens2 License, which has terms of use: read it before you train with
them.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 36.3 GiB each, 0.27 s a step, 6.1 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/timm/upernet_vit_5b_sapiens2_512_80k_ade20k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../dinov3/upernet_vit_7b_512_80k_ade20k_bs16_lr4e-5.py"]
model = dict(
    backbone=dict(
        model_name="vit_5b_patch16_sapiens2",
        out_indices=[13, 27, 41, 55],
        pretrained="./pretrained/vit_5b_patch16_sapiens2.fb",
    ),
    decode_head=dict(in_channels=[2432, 2432, 2432, 2432]),
    auxiliary_head=dict(in_channels=2432),
)
optimizer = dict(paramwise_cfg=dict(num_layers=56))
