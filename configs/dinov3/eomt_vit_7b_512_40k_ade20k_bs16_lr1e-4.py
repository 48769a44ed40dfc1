"""EoMT on DINOv3's ViT-7B/16 (6.9 B parameters), every parameter trained for 40,000 steps: queries join the last
5 of 40 blocks.

No score is published, and none was measured here. The recipe is that of EoMT-L, with 5 blocks, which are what is
published for ViT-g of 40 blocks, and a learning-rate decay of 0.9 a layer: with 0.8, the first of 40 would train
at a ten-thousandth.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 53.3 GiB each, 0.34 s a step, 3.8 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/eomt_vit_7b_512_40k_ade20k_bs16_lr1e-4.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["eomt_vit_large_512_40k_ade20k_bs16_lr1e-4.py"]
model = dict(
    backbone=dict(
        model_name="vit_7b_patch16_dinov3",
        out_indices=[39],
        with_cp=True,
        pretrained="./pretrained/vit_7b_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(num_blocks=5),
)
optimizer = dict(paramwise_cfg=dict(num_layers=40, layer_decay_rate=0.9))
