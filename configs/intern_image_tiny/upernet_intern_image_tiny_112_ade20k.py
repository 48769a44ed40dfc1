"""The demo on a tiny InternImage (3 M parameters): UPerNet, trained from scratch on images in ADE20K's
layout, two CPU cores or any GPU.

It has every part of InternImage-H, small: norms after the residual branches and after some blocks of the
third level, centre feature scale, depth-wise convolutions of 5 x 5. What InternImage-T has instead is reached
by

    --cfg-options model.backbone.res_post_norm=False model.backbone.level2_post_norm=False model.backbone.center_feature_scale=False \
                  model.backbone.dw_kernel_size=None model.backbone.layer_scale=1.0

Data and schedule are the other demo's. No score is published (ours: 50.6 mIoU on the generated images, 2
processes under ZeRO-3). Global batch: 8 images = 2 processes x 4; other numbers of processes accumulate
gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/intern_image_tiny/upernet_intern_image_tiny_112_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="InternImage",
        core_op="DCNv3",
        channels=32,
        depths=[2, 2, 4, 2],
        groups=[2, 4, 8, 16],
        mlp_ratio=4.0,
        drop_path_rate=0.1,
        norm_layer="LN",
        layer_scale=None,
        offset_scale=1.0,
        post_norm=False,
        dw_kernel_size=5,
        res_post_norm=True,
        level2_post_norm=True,
        level2_post_norm_block_ids=[1, 3],
        center_feature_scale=True,
        with_cp=True,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=None),  # a weight file; None: random weights
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256]),
    auxiliary_head=dict(in_channels=128),
    test_cfg=dict(_delete_=True, mode="whole"),
)
# from scratch: twice the ViT's learning rate, in every layer
optimizer = dict(
    lr=2e-3, paramwise_cfg=dict(num_layers=10, depths=[2, 2, 4, 2], layer_decay_rate=1.0, offset_lr_scale=1.0)
)
optimizer_config = dict(grad_clip=dict(max_norm=1.0, norm_type=2))
