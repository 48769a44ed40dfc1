"""ADE20K in crops of 504 pixels for the few-shot experiments, each of which sets `data.train.max_image_num`.

Differs from ade20k_504x504.py in one step, as published: evaluation images are only fitted into 2016 x 504
(Resize), so that the short side of a very long image may be less than a crop.
"""

_base_ = "./ade20k_504x504.py"

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(2016, 504),
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="ResizeToMultiple", size_divisor=14),
            dict(type="RandomFlip"),
            dict(type="Normalize", **img_norm_cfg),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(val=dict(pipeline=test_pipeline), test=dict(pipeline=test_pipeline))
