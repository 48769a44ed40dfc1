"""LoveDA (2,522 training and 1,669 validation aerial images of 1024 pixels, 7 classes) in crops of 512 pixels,
normalised as DINOv3's satellite models were pretrained (SAT-493M), not as ImageNet.

Expected on disk, as mmseg's tools/convert_datasets/loveda.py leaves it:

    data/loveDA/img_dir/{train,val}/*.png
    data/loveDA/ann_dir/{train,val}/*.png     one byte a pixel: 1 to 7, or 0 for "no data", which is ignored

Training: the image is scaled by 0.5 to 2, then cropped. Evaluation: the whole image as it is.
"""

dataset_type = "LoveDADataset"
data_root = "data/loveDA"
# (0.430, 0.411, 0.296) and (0.213, 0.156, 0.143), times 255
img_norm_cfg = dict(mean=[109.65, 104.805, 75.48], std=[54.315, 39.78, 36.465], to_rgb=True)
crop_size = (512, 512)
img_scale = (1024, 1024)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
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
training = dict(type=dataset_type, data_root=data_root, img_dir="img_dir/train", ann_dir="ann_dir/train")
validation = dict(type=dataset_type, data_root=data_root, img_dir="img_dir/val", ann_dir="ann_dir/val")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**training, pipeline=train_pipeline),
    val=dict(**validation, pipeline=test_pipeline),
    test=dict(**validation, pipeline=test_pipeline),
)
