"""A linear classifier of each patch on one block of InternViT-6B: batch norm, then a 1 x 1 convolution to
ADE20K's 150 classes.

The backbone's pretrained weights: OpenGVLab's InternViT-6B-224px, whose position embedding is resized from
224 to 504 pixels when it is loaded.
"""

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
        freeze_vit=False,
        out_indices=[47],
        pretrained="./pretrained/intern_vit_6b_224px.pth",
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=3200,
        channels=3200,
        num_convs=0,
        dropout_ratio=0.0,
        concat_input=False,
        num_classes=150,
        with_norm=True,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    test_cfg=dict(mode="slide", crop_size=(504, 504), stride=(322, 322)),
)
