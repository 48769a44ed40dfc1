"""COCO-Stuff-164k (118,287 training and 5,000 validation images, 171 classes) in crops of 512 pixels, for
backbones that take images of any size.

Expected on disk, as mmseg's tools/convert_datasets/coco_stuff164k.py leaves it:

    data/coco_stuff164k/images/{train2017,val2017}/*.jpg
    data/coco_stuff164k/annotations/{train2017,val2017}/*_labelTrainIds.png     one byte a pixel: 0 to 170, or 255 for "do not count"

Training: the image is fitted into 2048 x 512, times 0.5 to 2, then cropped. Evaluation: fitted into 2048 x
512, both sides multiples of 32.
"""

_base_ = "./ade20k_512x512.py"

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (512, 512)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", img_scale=(2048, 512), ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
]
common = dict(type="COCOStuffDataset", data_root="data/coco_stuff164k")
training = dict(img_dir="images/train2017", ann_dir="annotations/train2017", pipeline=train_pipeline)
validation = dict(img_dir="images/val2017", ann_dir="annotations/val2017")
data = dict(
    train=dict(**common, **training), val=dict(**common, **validation), test=dict(**common, **validation)
)
