"""The demo on a tiny DINOv3 of transformers (0.2 M parameters): UPerNet, trained from scratch on images in
ADE20K's layout, two CPU cores or any GPU.

The fields of `config` make transformers' DINOv3 tiny; with `pretrained`, a folder of its page, they are not needed. Rotary positions, class and
register tokens, layer scale and drop path are those of the 7 B model. Data and schedule are the other demo's. No score is published.
Global batch: 8 images = 2 processes x 4; other numbers of processes accumulate gradients up to it.

    deepspeed --num_gpus 2 launch/train.py configs/transformers_tiny/upernet_dinov3_tiny_112_ade20k.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = ["../timm_tiny/upernet_dinov3_tiny_112_ade20k.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="TransformersBackbone",
        config=dict(
            model_type="dinov3_vit",
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_register_tokens=4,
        ),
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        with_cp=True,
        pretrained=None,
    )
)
work_dir = "work_dirs/upernet_transformers_dinov3_tiny_112_ade20k"  # of its name, timm's demo has one too
