"""LoveDA: 2,522 training and 1,669 validation aerial images of 1024 x 1024 pixels, 7 classes, numbered from 1: use a pipeline
from_1.

    data/loveDA/img_dir/{train,val}/*.png
    data/loveDA/ann_dir/{train,val}/*.png     1 to 7; 0 stands for no data
"""

common = dict(type="LoveDADataset", data_root="data/loveDA")
training = dict(img_dir="img_dir/train", ann_dir="ann_dir/train")
validation = dict(img_dir="img_dir/val", ann_dir="ann_dir/val")

# 1024 x 1024 pixels, as they are: what mmseg's LoveDA experiments evaluate at, whatever they train at
whole_tiles = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(1024, 1024),
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="RandomFlip"),
            dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
