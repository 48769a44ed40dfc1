"""The demo on a tiny DINOv3 of timm (0.2 M parameters): UPerNet, trained from scratch on images in ADE20K's
layout, two CPU cores or any GPU.

`model_args` makes timm's ViT-S/16 of DINOv3 tiny; without them it is the published one, and `pretrained` takes
its file or folder. Rotary positions, class and register tokens, layer scale and drop path are those of the
7 B model. Data and schedule are the other demo's. No score is published. Global batch: 8 images = 2 processes x 4;
other numbers of processes accumulate gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/timm_tiny/upernet_dinov3_tiny_112_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmBackbone",
        model_name="vit_small_patch16_dinov3",
        model_args=dict(embed_dim=64, depth=4, num_heads=4),
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        with_cp=True,
        pretrained=None,
    ),
    decode_head=dict(in_channels=[64, 64, 64, 64]),
    auxiliary_head=dict(in_channels=64),
    test_cfg=dict(crop_size=(112, 112), stride=(80, 80)),
)
optimizer = dict(paramwise_cfg=dict(num_layers=4, layer_decay_rate=0.9))
