"""The recipe of all InternImage experiments: AdamW, linear warmup over 1,500 steps, then a straight line to 0
over 160,000, unless they say 80,000 or 40,000.

A step is one optimizer update on 16 images, at any number of GPUs: `engine.global_batch` makes up the
difference by accumulating gradients. T, S and B (trained on ImageNet-1k) take the lr of this file in all
layers and no clipping; larger ones 2e-5 or 1e-5, layer-wise decay, and in most experiments gradients clipped to
a norm of 0.1.
"""

engine = dict(global_batch=16)
optimizer = dict(
    type="AdamW",
    lr=6e-5,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(num_layers=30, layer_decay_rate=1.0, depths=[4, 4, 18, 4]),
)
optimizer_config = dict()
lr_config = dict(
    policy="poly",
    warmup="linear",
    warmup_iters=1500,
    warmup_ratio=1e-6,
    power=1.0,
    min_lr=0.0,
    by_epoch=False,
)
runner = dict(type="IterBasedRunner", max_iters=160000)
checkpoint_config = dict(by_epoch=False, interval=1000, max_keep_ckpts=1)
evaluation = dict(interval=16000, metric="mIoU", pre_eval=True, save_best="mIoU")
cudnn_benchmark = True
