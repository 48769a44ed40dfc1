"""UPerNet on a feature pyramid of InternViT-6B: blocks 12, 24, 36 and 48 of 48, ADE20K's 150 classes, and an
auxiliary FCN head.

The backbone's pretrained weights: OpenGVLab's InternViT-6B-224px, whose position embedding is resized from
224 to 504 pixels when it is loaded.
"""

norm_cfg = dict(type="SyncBN", requires_grad=True)
loss = dict(type="CrossEntropyLoss", use_sigmoid=False)

model = dict(
    type="EncoderDecoder",
    pretrained=None,
    backbone=dict(
        type="InternViT6B",
        pretrain_size=224,
        img_size=504,
        patch_size=14,
        embed_dim=3200,
        depth=48,
        num_heads=25,
        mlp_ratio=4.0,
        qkv_bias=False,
        drop_path_rate=0.0,
        init_values=0.1,
        with_cp=True,
        use_flash_attn=True,
        qk_normalization=True,
        layerscale_force_fp32=False,
        with_fpn=True,
        freeze_vit=False,
        out_indices=[11, 23, 35, 47],
        pretrained="./pretrained/intern_vit_6b_224px.pth",
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[3200, 3200, 3200, 3200],
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
        in_channels=3200,
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
    test_cfg=dict(mode="slide", crop_size=(504, 504), stride=(322, 322)),
)
