"""Mask2Former on the tiny InternImage: what InternImage-H with Mask2Former is made of, small.

Data and head are those of the other Mask2Former demo; the schedule is twice as long. No score is published
(ours: 61.1 mIoU on the generated images, from scratch, 2 processes under ZeRO-2). Global batch: 8 images = 2
processes x 4; other numbers of processes accumulate gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/intern_image_tiny/mask2former_intern_image_tiny_112_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../intern_vit_tiny/mask2former_intern_vit_tiny_112_ade20k.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="InternImage",
        channels=32,
        depths=[2, 2, 4, 2],
        groups=[2, 4, 8, 16],
        drop_path_rate=0.0,
        layer_scale=None,
        dw_kernel_size=5,
        res_post_norm=True,
        level2_post_norm=True,
        level2_post_norm_block_ids=[1, 3],
        center_feature_scale=True,
        with_cp=True,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256]),
    test_cfg=dict(_delete_=True, mode="whole"),
)
optimizer = dict(
    paramwise_cfg=dict(num_layers=10, depths=[2, 2, 4, 2], layer_decay_rate=1.0, offset_lr_scale=1.0)
)
runner = dict(max_iters=840)
