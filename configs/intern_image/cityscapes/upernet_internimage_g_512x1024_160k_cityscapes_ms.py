"""Multi-scale test of upernet_internimage_g_512x1024_160k_cityscapes.py: six scales from 0.5 to 1.75, each
also mirrored.

Published score: none. The experiment is the same but for its test, which takes twelve forwards an image.

    deepspeed launch/test.py configs/intern_image/cityscapes/upernet_internimage_g_512x1024_160k_cityscapes_ms.py CHECKPOINT --eval mIoU
"""

_base_ = ["./upernet_internimage_g_512x1024_160k_cityscapes.py"]

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(2048, 1024),
        img_ratios=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
        flip=True,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="ResizeToMultiple", size_divisor=32),
            dict(type="RandomFlip"),
            dict(type="Normalize", **img_norm_cfg),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(test=dict(pipeline=test_pipeline))
