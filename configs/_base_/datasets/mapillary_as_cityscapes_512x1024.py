"""Mapillary Vistas with the 19 classes of Cityscapes in crops of 512 x 1024 pixels, as OpenGVLab trains
InternImage before Cityscapes: on Mapillary's training and validation images (20,000), evaluated on
Cityscapes'.

The files as layouts/mapillary.py and layouts/cityscapes.py say. `MapillaryHack` behind LoadAnnotations turns
Mapillary's numbers into those of Cityscapes, and what is none of these into 255.
"""

_base_ = ["../layouts/cityscapes.py", "../pipelines/street_512x1024.py"]
train_pipeline = [
    {{_base_.image}},
    {{_base_.labels}},
    dict(type="MapillaryHack"),
    dict(type="Resize", img_scale={{_base_.img_scale}}, ratio_range=(0.5, 1.0)),
    dict(type="RandomCrop", crop_size={{_base_.crop_size}}, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    dict(type="Pad", size={{_base_.crop_size}}, pad_val=0, seg_pad_val=255),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
]
data = dict(
    train=dict(
        type="MapillaryDataset",
        data_root="data/Mapillary/",
        img_dir=["training/images", "validation/images"],
        ann_dir=["training/labels", "validation/labels"],
        pipeline=train_pipeline,
    ),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
