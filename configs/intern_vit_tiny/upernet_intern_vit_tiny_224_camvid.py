"""One's own data set: a small InternViT trained from scratch on CamVid, street photographs of 480 x 360
pixels with 11 classes.

Copy this file (outside this folder `_base_` needs another path) and change what the comments name; no Python
class is needed. Expected on disk (CamVid is for research use and is not part of this project):

    data/camvid/images/{training,validation}/*.jpg         367 and 101 photographs
    data/camvid/annotations/{training,validation}/*.png    the same names; one byte a pixel: the class, from 0, or 255 for "do not count this pixel"

Published score: none. Global batch: 8 images = 2 processes x 4; other numbers of processes accumulate
gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../_base_/default_runtime.py"]

engine = dict(global_batch=8)  # images per optimizer step, at any number of processes

# -- the data: class n is the n-th name, and is painted in the n-th colour (red, green, blue) --
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
# what a pixel of each class weighs in the loss: 1 / sqrt(share of the training pixels), mean 1 over pixels;
# None where no class is rare
class_weight = [0.88, 0.75, 3.63, 0.64, 1.7, 1.15, 3.32, 3.39, 1.49, 4.5, 6.66]

img_scale = (480, 360)  # (longer side, shorter side): photographs are fitted into it
crop_size = (224, 224)  # (height, width): what the model sees at once, a multiple of patch_size
# those of ImageNet; pretrained weights expect them
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    # reduce_zero_label=True would be for data whose label 0 means "none of the classes", as in ADE20K
    dict(type="LoadAnnotations"),
    dict(type="Resize", img_scale=img_scale, ratio_range=(0.75, 1.5)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),  # at most 75 % of a crop is one class
    dict(type="RandomFlip", prob=0.5),
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
            # so that an image smaller than a crop is whole patches too
            dict(type="ResizeToMultiple", size_divisor=14),
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
data = dict(samples_per_gpu=4, workers_per_gpu=1, train=training, val=validation, test=validation)

# -- the model: 8 blocks of 192 channels, four of them feed UPerNet; with pretrained weights, set
# backbone.pretrained and the sizes of those weights --
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    pretrained=None,
    backbone=dict(
        type="InternViT6B",
        pretrain_size=224,
        img_size=224,
        patch_size=14,
        embed_dim=192,
        depth=8,
        num_heads=6,
        drop_path_rate=0.0,
        init_values=1.0,  # from scratch; leave it out with pretrained weights
        with_cp=False,  # True saves memory and costs a third more time
        use_flash_attn=False,
        with_fpn=True,
        out_indices=[1, 3, 5, 7],
        pretrained=None,
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[192, 192, 192, 192],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=64,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0, class_weight=class_weight
        ),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=192,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    # overlapping windows, 11 patches apart
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(154, 154)),
)

# -- the schedule, in steps: 367 photographs are 46 steps, so this is 26 times through them --
optimizer = dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05)
optimizer_config = dict()
lr_config = dict(
    policy="poly", warmup="linear", warmup_iters=100, warmup_ratio=1e-6, power=1.0, min_lr=0.0, by_epoch=False
)
runner = dict(type="IterBasedRunner", max_iters=1200)
checkpoint_config = dict(by_epoch=False, interval=600, max_keep_ckpts=2)
evaluation = dict(interval=600, metric="mIoU", pre_eval=True, save_best="auto")
log_config = dict(interval=25)
