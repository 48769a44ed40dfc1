"""Cityscapes (2,975 training and 500 validation images of 2048 x 1024 pixels, 19 classes) in crops of 512 x
1024.

Expected on disk, as the data set is distributed, with the label maps of 19 training ids that
createTrainIdLabelImgs of cityscapesscripts writes beside the others:

    data/cityscapes/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
    data/cityscapes/gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png     one byte a pixel: 0 to 18, or 255 for "do not count this pixel"

Training: the image is scaled by 0.5 to 2, then cropped. Evaluation: the whole image at once, as it is.
"""

dataset_type = "CityscapesDataset"
data_root = "data/cityscapes/"
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (512, 1024)
img_scale = (2048, 1024)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", img_scale=img_scale, ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=img_scale,
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="RandomFlip"),
            dict(type="Normalize", **img_norm_cfg),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
training = dict(type=dataset_type, data_root=data_root, img_dir="leftImg8bit/train", ann_dir="gtFine/train")
validation = dict(type=dataset_type, data_root=data_root, img_dir="leftImg8bit/val", ann_dir="gtFine/val")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=2,
    train=dict(**training, pipeline=train_pipeline),
    val=dict(**validation, pipeline=test_pipeline),
    test=dict(**validation, pipeline=test_pipeline),
)
