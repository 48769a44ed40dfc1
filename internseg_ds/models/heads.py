"""The heads of a segmentor, as mmseg's segmentors hold them: decode_head (in cascades a list) and auxiliary_head (one, a list, or none)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def heads(segmentor: nn.Module) -> list[nn.Module]:
    """All heads that run in training."""
    found = [head for name in ("decode_head", "auxiliary_head") if (head := getattr(segmentor, name, None)) is not None]
    return [part for head in found for part in (head if isinstance(head, nn.ModuleList) else [head])]


def stand_in_loss(head: nn.Module, features: Sequence[Tensor], labels: Tensor) -> Tensor:
    """A scalar that takes the memory of a head's loss, on tensors that may have no values (planning).

    features: the backbone's maps. labels: (b, h, w) int64. A head that computes no loss of pixels says itself what stands in, by a method
    `stand_in_loss(features, labels)`; of the others, which bring logits to the size of the labels, it is a cross entropy of each (b, classes, h, w)
    that they put out.
    """
    if hasattr(head, "stand_in_loss"):
        return head.stand_in_loss(features, labels)
    maps = (leaf for leaf in tree_leaves(head(features)) if isinstance(leaf, Tensor) and leaf.dim() == 4)
    return sum(F.cross_entropy(F.interpolate(logits, size=labels.shape[1:], mode="bilinear"), labels) for logits in maps)
