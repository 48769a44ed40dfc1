"""The heads of a segmentor, as mmseg's segmentors hold them: decode_head (in cascades a list) and auxiliary_head (one, a list, or none)."""

from torch import nn


def heads(segmentor: nn.Module) -> list[nn.Module]:
    """All heads that run in training."""
    found = [head for name in ("decode_head", "auxiliary_head") if (head := getattr(segmentor, name, None)) is not None]
    return [part for head in found for part in (head if isinstance(head, nn.ModuleList) else [head])]
