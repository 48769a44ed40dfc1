"""The demo: UPerNet on a tiny InternViT (1 M parameters), trained from scratch on images in ADE20K's layout,
two CPU cores or any GPU.

It has every part of the published 6 B experiment, small: feature pyramid, auxiliary head, layer-wise learning
rates, sliding-window evaluation. No score is published. Global batch: 8 images = 2 processes x 4; other
numbers of processes accumulate gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

# model
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    pretrained=None,
    backbone=dict(
        type="InternViT6B",
        patch_size=14,
        img_size=112,
        pretrain_size=112,
        embed_dim=128,
        depth=4,
        num_heads=4,
        drop_path_rate=0.1,
        init_values=1.0,  # the published 0.1 is for pretrained weights; from scratch it would slow the start
        with_cp=True,
        use_flash_attn=False,
        with_fpn=True,
        out_indices=[0, 1, 2, 3],
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[128, 128, 128, 128],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=64,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=128,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(112, 112), stride=(70, 70)),
)

# data
dataset_type = "ADE20KDataset"
data_root = "data/ade/ADEChallengeData2016"
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (112, 112)
img_scale = (448, 112)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="Resize", img_scale=img_scale, ratio_range=(0.75, 1.5)),
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
    samples_per_gpu=4,
    workers_per_gpu=1,
    train=dict(**training, pipeline=train_pipeline),
    val=dict(**validation, pipeline=test_pipeline),
    test=dict(**validation, pipeline=test_pipeline),
)

# schedule
engine = dict(global_batch=8)
optimizer = dict(
    type="AdamW",
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(num_layers=4, layer_decay_rate=0.9),
)
optimizer_config = dict()
lr_config = dict(
    policy="poly", warmup="linear", warmup_iters=50, warmup_ratio=1e-6, power=1.0, min_lr=0.0, by_epoch=False
)
runner = dict(type="IterBasedRunner", max_iters=420)
checkpoint_config = dict(by_epoch=False, interval=210, max_keep_ckpts=2)
evaluation = dict(interval=210, metric="mIoU", pre_eval=True, save_best="auto")
log_config = dict(
    interval=25, hooks=[dict(type="TextLoggerHook", by_epoch=False), dict(type="TensorboardLoggerHook")]
)
log_level = "INFO"
load_from = None
resume_from = None
