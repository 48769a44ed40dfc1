"""mask2former_internimage_h_896_80k_cocostuff2ade20k_ss.py, evaluated at five scales from 768 to 1024 pixels,
each also mirrored.

Published score: 62.9 mIoU on ADE20K val, multi-scale. An evaluation takes ten forwards an image. In training,
16 GPUs x 1 divide the losses of masks by the masks of the whole step, fewer GPUs by those of a micro-batch.

    deepspeed launch/test.py configs/intern_image/ade20k/mask2former_internimage_h_896_80k_cocostuff2ade20k_ms.py CHECKPOINT --eval mIoU
"""

_base_ = ["./mask2former_internimage_h_896_80k_cocostuff2ade20k_ss.py"]

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(3584, 896),
        img_ratios=[768 / 896, 832 / 896, 1.0, 960 / 896, 1024 / 896],
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
data = dict(val=dict(pipeline=test_pipeline), test=dict(pipeline=test_pipeline))
