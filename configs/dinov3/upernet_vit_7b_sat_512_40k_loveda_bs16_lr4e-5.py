"""Full tuning: UPerNet on DINOv3's satellite ViT-7B/16 (SAT-493M), every parameter trained for 40,000 steps on
LoveDA.

Images are normalised by the satellite weights' own mean and standard deviation. No score is published, and
none was measured here. Learning rates as on ADE20K.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 40.5 GiB each, 0.33 s a step, 3.7 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/upernet_vit_7b_sat_512_40k_loveda_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../_base_/models/upernet_dinov3_vit_7b.py",
    "../_base_/datasets/loveda_512x512_sat.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(drop_path_rate=0.4, pretrained="./pretrained/vit_7b_patch16_dinov3.sat493m"),
    decode_head=dict(num_classes=7),
    auxiliary_head=dict(num_classes=7),
)
optimizer = dict(paramwise_cfg=dict(num_layers=40))
runner = dict(max_iters=40000)
