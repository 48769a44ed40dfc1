"""The recipe of all InternViT-6B experiments: AdamW with layer-wise learning rates, linear warmup, then a
straight line to 0 over 80,000 steps.

A step is one optimizer update on 16 images, at any number of GPUs: `engine.global_batch` makes up the
difference by accumulating gradients.
"""

engine = dict(global_batch=16)
optimizer = dict(
    type="AdamW",
    lr=4e-5,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(num_layers=48, layer_decay_rate=0.95),  # lr of block n: 4e-5 * 0.95 ** (48 - n)
)
optimizer_config = dict()  # no gradient clipping
lr_config = dict(
    policy="poly",
    warmup="linear",
    warmup_iters=1500,
    warmup_ratio=1e-6,
    power=1.0,
    min_lr=0.0,
    by_epoch=False,
)
runner = dict(type="IterBasedRunner", max_iters=80000)
checkpoint_config = dict(by_epoch=False, interval=1000, max_keep_ckpts=2)
evaluation = dict(interval=1000, metric="mIoU", pre_eval=True, save_best="auto")
