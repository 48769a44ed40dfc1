"""Full tuning: UPerNet on InternViT-300M V2.5 (24 blocks, 0.3 B parameters) from a folder of transformers, every
parameter trained for 80,000 steps.

No score is published, and none was measured here. The recipe is that of InternViT-6B's full tuning. The weights
are the vision tower of OpenGVLab's InternVL3-1B-hf (Hugging Face hub; under the MIT license, the language model
beside it under its own), which alone is read; its position embedding is resized from 448 to 504 pixels.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 15.5 GiB each, 0.15 s a step, 3.4 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/transformers/upernet_intern_vit_300m_v2_5_504_80k_ade20k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero1_bf16.json
"""

_base_ = ["upernet_intern_vit_6b_v2_5_504_80k_ade20k_bs16_lr4e-5.py"]
model = dict(
    backbone=dict(
        config=dict(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            attention_bias=True,
            use_qk_norm=False,
            norm_type="layer_norm",
        ),
        out_indices=[5, 11, 17, 23],
        pretrained="./pretrained/InternVL3-1B-hf",
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optimizer = dict(paramwise_cfg=dict(num_layers=24))
