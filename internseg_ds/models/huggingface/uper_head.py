"""What mmseg's UPerHead must be for transformers' UPerNet, and for ours, to compute the same."""

from typing import Any

from torch import nn

from internseg_ds.torch_internals import BATCH_NORM

NORM_EPS = 1e-5
"""Of the batch norms of a head, in mmseg's defaults and in transformers."""


def check_uper_head(segmentor: Any) -> Any:
    """The segmentor's UPerHead. Raises ValueError for a setting that the classes that load a folder do not have."""
    head = segmentor.decode_head
    if segmentor.with_neck:
        raise ValueError(f"model.neck={type(segmentor.neck).__name__} stands between backbone and head")
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
