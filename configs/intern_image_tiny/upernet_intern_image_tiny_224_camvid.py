"""One's own data set with a tiny InternImage, trained from scratch: CamVid, described and prepared in
../intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py.

Published score: none (ours: 48.2 mIoU, 2 processes under ZeRO-1, a quarter of an hour on 2 CPU cores). Global
batch: 8 images = 2 processes x 4; other numbers of processes accumulate gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/intern_image_tiny/upernet_intern_image_tiny_224_camvid.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="InternImage",
        channels=16,
        depths=[2, 2, 4, 2],
        groups=[2, 4, 8, 16],
        drop_path_rate=0.0,
        layer_scale=1.0,
        with_cp=False,
        init_cfg=dict(type="Pretrained", checkpoint=None),  # a weight file; None: random weights
    ),
    decode_head=dict(in_channels=[16, 32, 64, 128]),
    auxiliary_head=dict(in_channels=64),
    test_cfg=dict(_delete_=True, mode="whole"),
)
# as in the demo on this backbone
optimizer = dict(lr=2e-3)
optimizer_config = dict(grad_clip=dict(max_norm=1.0, norm_type=2))
