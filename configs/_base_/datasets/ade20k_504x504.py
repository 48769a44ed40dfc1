"""ADE20K (20,210 training and 2,000 validation images, 150 classes) in crops of 504 pixels, 36 patches of 14.

Training: the image is fitted into 2016 x 504, times 0.5 to 2, then cropped. Evaluation: the short side
becomes at least 504 (SETR_Resize) and both sides multiples of a patch; the model's test_cfg then slides over
it. Label 0 ("other") is ignored: reduce_zero_label.
"""

dataset_type = "ADE20KDataset"
data_root = "data/ade/ADEChallengeData2016"
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (504, 504)
img_scale = (2016, 504)

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
            dict(type="SETR_Resize", keep_ratio=True, crop_size=crop_size, setr_multi_scale=True),
            dict(type="ResizeToMultiple", size_divisor=14),
            dict(type="RandomFlip"),
            dict(type="Normalize", **img_norm_cfg),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
training = dict(
    type=dataset_type, data_root=data_root, img_dir="images/training", ann_dir="annotations/training"
)
validation = dict(
    type=dataset_type, data_root=data_root, img_dir="images/validation", ann_dir="annotations/validation"
)

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**training, pipeline=train_pipeline),
    val=dict(**validation, pipeline=test_pipeline),
    test=dict(**validation, pipeline=test_pipeline),
)
