"""One's own data set with Mask2Former on a tiny InternImage, from the backbone of the UPerNet experiment
beside it, or from scratch.

The data are CamVid, described and prepared in ../intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py. What
Mask2Former needs beside that: `ToMask` right before DefaultFormatBundle, its two results in Collect, and in
the head a class weight for "no object" behind those of the classes.

Published score: none (ours: 46.2 mIoU from the backbone of a UPerNet that had 48.2, and 40.0 from one that
had 36.8; 2 processes under ZeRO-3. Heads of this kind take long from scratch: with twice the channels 26.6
after the first 600 steps). Global batch: 8 images = 2 processes x 4; other numbers of processes accumulate
gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/intern_image_tiny/upernet_intern_image_tiny_224_camvid.py
    deepspeed --num_gpus 2 launch/train.py configs/intern_image_tiny/mask2former_intern_image_tiny_224_camvid.py \
              --cfg-options model.backbone.init_cfg.checkpoint=work_dirs/upernet_intern_image_tiny_224_camvid/checkpoints
"""

_base_ = ["./mask2former_intern_image_tiny_112_ade20k.py"]

# data
classes = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
palette = [
    [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
    [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
]  # fmt: skip
num_classes = len(classes)
img_scale = (480, 360)
crop_size = (224, 224)
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", img_scale=img_scale, ratio_range=(0.75, 1.5)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
    dict(type="ToMask"),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg", "gt_masks", "gt_labels"]),
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
camvid = dict(
    type="CustomDataset",
    data_root="data/camvid",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    classes=classes,
    palette=palette,
)
training = dict(**camvid, img_dir="images/training", ann_dir="annotations/training", pipeline=train_pipeline)
validation = dict(
    **camvid, img_dir="images/validation", ann_dir="annotations/validation", pipeline=test_pipeline
)
data = dict(
    _delete_=True, samples_per_gpu=4, workers_per_gpu=1, train=training, val=validation, test=validation
)

# model
model = dict(
    backbone=dict(
        _delete_=True,
        type="InternImage",
        channels=16,
        depths=[2, 2, 4, 2],
        groups=[2, 4, 8, 16],
        drop_path_rate=0.0,
        layer_scale=1.0,
        with_cp=False,
        init_cfg=dict(type="Pretrained", checkpoint=None),  # None: random weights
    ),
    decode_head=dict(
        in_channels=[16, 32, 64, 128],
        num_classes=num_classes,
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
    ),
)

# schedule
optimizer = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
lr_config = dict(warmup_iters=100)
runner = dict(max_iters=1200)
checkpoint_config = dict(interval=300)
evaluation = dict(interval=300)
