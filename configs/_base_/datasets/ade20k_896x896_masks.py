"""ADE20K in crops of 896 pixels whose training images come with one mask per class, as Mask2Former is
trained; evaluation as in ade20k_896x896.py."""

_base_ = "./ade20k_896x896.py"

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="Resize", img_scale=(3584, 896), ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=(896, 896), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=(896, 896), pad_val=0, seg_pad_val=255),
    dict(type="ToMask"),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg", "gt_masks", "gt_labels"]),
]
data = dict(train=dict(pipeline=train_pipeline))
