"""Crops of 512 pixels: a training image is fitted into 2048 x 512, times 0.5 to 2, then cropped; an evaluated
one is fitted into 2048 x 512, to sides that are multiples of 32.

`train_pipelines`: from_0, for label maps whose classes are numbered from 0; from_1, for those where 0 stands
for none (reduce_zero_label); ..._masks, with one mask for each class, as Mask2Former is trained.
"""

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (512, 512)
img_scale = (2048, 512)

image = dict(type="LoadImageFromFile")
labels, labels_from_1 = dict(type="LoadAnnotations"), dict(type="LoadAnnotations", reduce_zero_label=True)
augmentation = [
    dict(type="Resize", img_scale=img_scale, ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
]
tensors = [dict(type="DefaultFormatBundle"), dict(type="Collect", keys=["img", "gt_semantic_seg"])]
masks = [
    dict(type="ToMask"),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg", "gt_masks", "gt_labels"]),
]
train_pipelines = dict(
    from_0=[image, labels, *augmentation, *tensors],
    from_1=[image, labels_from_1, *augmentation, *tensors],
    from_0_masks=[image, labels, *augmentation, *masks],
    from_1_masks=[image, labels_from_1, *augmentation, *masks],
)
test_pipeline = [
    image,
    dict(
        type="MultiScaleFlipAug",
        img_scale=img_scale,
        flip=False,
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
