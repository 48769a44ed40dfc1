"""UPerNet on DINOv3's ViT-7B/16 (6.7 B parameters): the maps of blocks 10, 20, 30 and 40, brought to four
scales by InternViT's pyramid, and an auxiliary FCN head on the third.

The backbone's pretrained weights: Meta's, in timm's layout (`vit_7b_patch16_dinov3` of the Hugging Face hub,
LVD-1689M). They are under the DINOv3 License, which has terms of use: read it before you train with them.
"""

norm_cfg = dict(type="SyncBN", requires_grad=True)
loss = dict(type="CrossEntropyLoss", use_sigmoid=False)

model = dict(
    type="EncoderDecoder",
    pretrained=None,
    backbone=dict(
        type="TimmBackbone",
        model_name="vit_7b_patch16_dinov3",
        out_indices=[9, 19, 29, 39],
        drop_path_rate=0.0,
        with_cp=True,
        freeze=False,
        neck="ViTFeaturePyramid",
        pretrained="./pretrained/vit_7b_patch16_dinov3.lvd1689m",
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[4096, 4096, 4096, 4096],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=1536,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(**loss, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=4096,
        in_index=2,
        channels=1536,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(**loss, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
