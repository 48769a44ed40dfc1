"""The parts that tiny segmentors are put together from, as sections of a config."""

from typing import Any

CLASSES, CROP = 150, 64
BN = dict(type="BN", requires_grad=True)
CROSS_ENTROPY = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)


def head(
    kind: str, in_channels: Any = 64, in_index: Any = 3, channels: int = 16, **arguments: Any
) -> dict[str, Any]:
    settings = dict(norm_cfg=BN, num_classes=CLASSES, align_corners=False, loss_decode=CROSS_ENTROPY)
    return dict(
        type=kind, in_channels=in_channels, in_index=in_index, channels=channels, **{**settings, **arguments}
    )


def fcn(in_channels: int = 64, in_index: int = 3, **arguments: Any) -> dict[str, Any]:
    return head("FCNHead", in_channels, in_index, **{"num_convs": 1, "concat_input": False, **arguments})


def levels(kind: str, in_channels: tuple[int, ...] = (8, 16, 32, 64), **arguments: Any) -> dict[str, Any]:
    """A head that takes several maps."""
    return head(kind, list(in_channels), list(range(len(in_channels))), **arguments)


def resnet(kind: str = "ResNet", depth: int = 18, base_channels: int = 8, **arguments: Any) -> dict[str, Any]:
    """Maps of 8, 16, 32 and 64 channels."""
    settings = dict(
        stem_channels=8, num_stages=4, out_indices=(0, 1, 2, 3), norm_cfg=BN, norm_eval=False, style="pytorch"
    )
    return dict(type=kind, depth=depth, base_channels=base_channels, **settings | arguments)


def vit(kind: str = "VisionTransformer", **arguments: Any) -> dict[str, Any]:
    """Four maps of 32 channels, a sixteenth of the image's size."""
    settings = dict(
        img_size=(CROP, CROP),
        patch_size=16,
        embed_dims=32,
        num_layers=4,
        num_heads=2,
        out_indices=(0, 1, 2, 3),
    )
    return dict(type=kind, **settings | arguments)


def segmentor(
    backbone: dict[str, Any], decode_head: Any = None, auxiliary_head: Any = None, **arguments: Any
) -> dict[str, Any]:
    settings = dict(
        type="EncoderDecoder",
        pretrained=None,
        train_cfg=dict(),
        test_cfg=dict(mode="slide", crop_size=(CROP, CROP), stride=(48, 48)),
    )
    return dict(
        backbone=backbone,
        decode_head=decode_head or fcn(),
        auxiliary_head=auxiliary_head,
        **settings | arguments,
    )


def on_resnet(decode_head: Any, auxiliary_head: Any = None, **arguments: Any) -> dict[str, Any]:
    return segmentor(resnet(), decode_head, auxiliary_head, **arguments)


def small_swin(kind: str = "SwinTransformer", **arguments: Any) -> dict[str, Any]:
    return dict(
        type=kind,
        **dict(
            pretrain_img_size=CROP, embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4
        )
        | arguments,
    )


def pyramid(kind: str, **arguments: Any) -> dict[str, Any]:
    """Twins."""
    return dict(
        type=kind,
        **dict(
            embed_dims=[8, 16, 32, 64],
            num_heads=[1, 2, 4, 8],
            depths=[2, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=[2, 2, 2, 2],
            norm_after_stage=False,
        )
        | arguments,
    )


def knet() -> dict[str, Any]:
    update = dict(
        type="KernelUpdateHead",
        num_classes=CLASSES,
        num_ffn_fcs=2,
        num_heads=2,
        num_mask_fcs=1,
        feedforward_channels=32,
        in_channels=16,
        out_channels=16,
        feat_transform_cfg=dict(conv_cfg=dict(type="Conv2d"), act_cfg=None),
        ffn_act_cfg=dict(type="ReLU", inplace=True),
        kernel_updator_cfg=dict(
            type="KernelUpdator",
            in_channels=16,
            feat_channels=16,
            out_channels=16,
            act_cfg=dict(type="ReLU", inplace=True),
            norm_cfg=dict(type="LN"),
        ),
    )
    return dict(
        type="IterativeDecodeHead",
        num_stages=2,
        kernel_update_head=[update, dict(update)],
        kernel_generate_head=fcn(num_convs=2, concat_input=True),
    )


def cascade(*heads: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return on_resnet(list(heads), **dict(type="CascadeEncoderDecoder", num_stages=len(heads)) | arguments)
