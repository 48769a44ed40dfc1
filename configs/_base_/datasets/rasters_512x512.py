"""Scenes of any size and any number of channels (GeoTIFF and whatever else GDAL reads) in crops of 512 pixels (32 patches
of 16). Copy this file, and set `mean`, `std` and the data below; the backbone takes as many channels (docs/data.md,
"Rasters").

Here: Sentinel-2's blue, green, red and near infrared in 16 bits, reflectance times 10,000. Training: windows of 1024
pixels are drawn and read, resized by 0.5 to 2, cropped. Evaluation: each window of 1024 pixels is an image.
"""

mean = [900.0, 1100.0, 1100.0, 2500.0]  # launch/check_data.py measures them
std = [600.0, 600.0, 700.0, 1000.0]
img_norm_cfg = dict(mean=mean, std=std, to_rgb=False)  # channels stay in the order of the file
crop_size = (512, 512)
window = (1024, 1024)

train_pipeline = [
    dict(type="LoadRasterWindow", crop_size=window),
    dict(type="LoadAnnotations"),
    dict(type="Resize", img_scale=window, ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
]
test_pipeline = [
    dict(type="LoadRaster", tile=window),
    dict(
        type="MultiScaleFlipAug",
        img_scale=None,
        img_ratios=[1.0],
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
files = dict(
    images="**/*.tif", masks="**/*_labels.tif", classes=["other", "water", "crops", "forest", "built"]
)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    # few scenes make short epochs: this counts each of them 1,000 times
    train=dict(
        type="RepeatDataset",
        times=1000,
        dataset=dict(type="FolderDataset", root="data/scenes/train", **files, pipeline=train_pipeline),
    ),
    val=dict(type="FolderDataset", root="data/scenes/val", **files, pipeline=test_pipeline),
    test=dict(type="FolderDataset", root="data/scenes/val", **files, pipeline=test_pipeline),
)
