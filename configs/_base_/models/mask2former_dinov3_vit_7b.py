"""Mask2Former on DINOv3's ViT-7B/16 (6.7 B parameters): the maps of blocks 10, 20, 30 and 40, brought to four
scales by InternViT's pyramid; the head is InternImage-H's (200 queries, 1024 wide).

DINOv3's own segmentor has a ViT-Adapter between backbone and head, and a head 2048 wide; this one has neither.
The backbone's pretrained weights: Meta's, in timm's layout (`vit_7b_patch16_dinov3` of the Hugging Face hub,
LVD-1689M). They are under the DINOv3 License, which has terms of use: read it before you train with them.
"""

_base_ = "./mask2former_intern_image_h.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmBackbone",
        model_name="vit_7b_patch16_dinov3",
        out_indices=[9, 19, 29, 39],
        drop_path_rate=0.0,
        with_cp=True,
        freeze=False,
        neck="ViTFeaturePyramid",
        pretrained="./pretrained/vit_7b_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(in_channels=[4096, 4096, 4096, 4096]),
)
