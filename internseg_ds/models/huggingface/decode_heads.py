"""Heads and feature pyramids of segmentors, as the classes that load a folder have them."""

from typing import Any

from mmseg.models.decode_heads import UPerHead
from torch import nn

from internseg_ds.models.fcn_head import FCNHead
from internseg_ds.models.feature_pyramids import SimpleFeaturePyramid, ViTFeaturePyramid
from internseg_ds.torch_internals import BATCH_NORM

NORM_EPS = 1e-5
"""Of the batch norms of a head, in mmseg's defaults and in transformers."""
HEADS = (UPerHead, FCNHead)


def check_head(segmentor: Any) -> Any:
    """The segmentor's UPerHead or FCNHead. Raises ValueError for a setting that the classes that load a folder do
    not have."""
    head = segmentor.decode_head
    if head.out_channels == 1:
        raise ValueError("a head with one output and a threshold has no counterpart there; train two classes")
    convolutions = [
        module for module in head.modules() if hasattr(module, "with_activation") and hasattr(module, "conv")
    ]
    for module in convolutions:
        norm: Any = getattr(module, "bn", None)
        if not isinstance(norm, BATCH_NORM) or norm.eps != NORM_EPS:
            raise ValueError("its norms are no batch norms with eps 1e-5 (decode_head.norm_cfg)")
        if not module.with_activation or type(module.activate) is not nn.ReLU:
            raise ValueError("its activations are no ReLU (decode_head.act_cfg)")
        if type(module.conv) is not nn.Conv2d:
            raise ValueError(f"its convolutions are {type(module.conv).__name__} (decode_head.conv_cfg)")
    return head


def head_settings(segmentor: Any) -> dict[str, Any]:
    """The arguments of the head's counterpart in `remote_code`. Raises ValueError as `check_head` does."""
    head = check_head(segmentor)
    if isinstance(head, UPerHead):
        return {
            "kind": "UPerHead",
            "in_index": list(head.in_index),
            "in_channels": list(head.in_channels),
            "channels": head.channels,
            "pool_scales": list(head.psp_modules.pool_scales),
        }
    if head.input_transform not in (None, "resize_concat"):
        raise ValueError(f"decode_head.input_transform={head.input_transform!r} has no counterpart there")
    first = head.convs[0].conv if head.num_convs else None
    kernel = head.conv_cat.conv.kernel_size[0] if head.concat_input else 1
    return {
        "kind": "FCNHead",
        "in_index": [head.in_index] if isinstance(head.in_index, int) else list(head.in_index),
        "in_channels": head.in_channels,
        "channels": head.channels,
        "num_convs": head.num_convs,
        "kernel_size": kernel if first is None else first.kernel_size[0],
        "dilation": 1 if first is None else first.dilation[0],
        "concat_input": head.concat_input,
        "with_norm": not isinstance(head.norm, nn.Identity),
    }


def pyramid_settings(neck: Any) -> dict[str, Any] | None:
    """The arguments of a neck's counterpart in `remote_code`; None for no neck. Raises ValueError for another."""
    if neck is None:
        return None
    if type(neck) is ViTFeaturePyramid:
        with_norm = any(name.startswith("stages.1.1.") for name, _ in neck.named_parameters())
        return {"kind": "ViTFeaturePyramid", "width": neck.channels[0], "with_norm": with_norm}
    if type(neck) is SimpleFeaturePyramid:
        stages: Any = neck.stages
        return {
            "kind": "SimpleFeaturePyramid",
            "width": stages[1][0].in_channels,
            "out_channels": neck.channels[0],
        }
    raise ValueError(
        f"a folder has no neck {type(neck).__name__}; it has ViTFeaturePyramid and SimpleFeaturePyramid"
    )
