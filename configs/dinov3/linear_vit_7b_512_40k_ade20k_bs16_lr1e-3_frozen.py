"""Linear probing: batch norm and one linear classifier trained for 40,000 steps on the last block of a frozen
DINOv3 ViT-7B/16, behind the model's last norm.

Published score: 55.9 mIoU on ADE20K val, single scale. Optimizer, batch, steps, crop and dropout are those of
the published code's defaults; its schedule rises and falls along cosines (one cycle), here it is a linear
warmup and a straight line to 0. Not measured here.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 19.8 GiB each, 0.07 s a step, 46 minutes in all (`launch/plan.py`).

    deepspeed launch/train.py configs/dinov3/linear_vit_7b_512_40k_ade20k_bs16_lr1e-3_frozen.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../_base_/datasets/ade20k_512x512.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    type="EncoderDecoder",
    pretrained=None,
    backbone=dict(
        type="TimmBackbone",
        model_name="vit_7b_patch16_dinov3",
        out_indices=[39],
        final_norm=True,
        freeze=True,
        pretrained="./pretrained/vit_7b_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=4096,
        channels=4096,
        num_convs=0,
        dropout_ratio=0.1,
        concat_input=False,
        num_classes=150,
        with_norm=True,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optimizer = dict(lr=1e-3, weight_decay=1e-2, paramwise_cfg=dict(num_layers=40, layer_decay_rate=1.0))
optimizer_config = dict(grad_clip=dict(max_norm=35.0, norm_type=2))
runner = dict(max_iters=40000)
