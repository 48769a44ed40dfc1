"""Full tuning: UPerNet on InternViT-6B V2.5 (45 blocks, 5.5 B parameters) from a folder of transformers, every
parameter trained for 80,000 steps.

No score is published, and none was measured here. The recipe is that of InternViT-6B's full tuning. The weights
are the vision tower of OpenGVLab's InternVL3-38B-hf (Hugging Face hub; under the MIT license, the language model
beside it under its own), which alone is read; its position embedding is resized from 448 to 504 pixels. The
original folder InternViT-6B-448px-V2_5 holds code, which is never run; `InternViT6B` reads its weights.
Global batch: 16 images = 8 GPUs x 2; other numbers of GPUs accumulate gradients up to it.
Planned for 8 H100 of 80 GB: 43.8 GiB each, 0.37 s a step, 8.1 hours in all (`launch/plan.py`).

    deepspeed launch/train.py configs/transformers/upernet_intern_vit_6b_v2_5_504_80k_ade20k_bs16_lr4e-5.py \
              --deepspeed_config ds_configs/zero3_bf16.json
"""

_base_ = [
    "../_base_/models/upernet_intern_vit_6b.py",
    "../_base_/datasets/ade20k_504x504.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="TransformersBackbone",
        config=dict(
            model_type="internvl_vision",
            hidden_size=3200,
            num_hidden_layers=45,
            num_attention_heads=25,
            intermediate_size=12800,
            attention_bias=False,
            use_qk_norm=True,
            norm_type="rms_norm",
            image_size=[504, 504],
            patch_size=[14, 14],
        ),
        out_indices=[10, 22, 33, 44],
        drop_path_rate=0.4,
        with_cp=True,
        neck="ViTFeaturePyramid",
        pretrained="./pretrained/InternVL3-38B-hf",
    )
)
optimizer = dict(paramwise_cfg=dict(num_layers=45))
