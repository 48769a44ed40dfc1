"""SegFormer's head on the four levels of an InternImage. The sizes given here are those of InternImage-T; each
experiment names its size, its classes and its pretrained weights."""

model = dict(
    type="EncoderDecoder",
    pretrained=None,
    backbone=dict(
        type="InternImage",
        core_op="DCNv3",
        channels=64,
        depths=[4, 4, 18, 4],
        groups=[4, 8, 16, 32],
        mlp_ratio=4.0,
        drop_path_rate=0.2,
        norm_layer="LN",
        layer_scale=1.0,
        offset_scale=1.0,
        post_norm=False,
        with_cp=False,
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(
        type="SegformerHead",
        in_channels=[64, 128, 256, 512],
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
