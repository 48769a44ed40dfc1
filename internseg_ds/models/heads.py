"""The heads of a segmentor, as mmseg's segmentors hold them: decode_head (in cascades a list) and auxiliary_head (one, a list, or none)."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from internseg_ds.models.derived_class import derived_class


def heads(segmentor: nn.Module) -> list[nn.Module]:
    """All heads that run in training."""
    found = [
        head
        for name in ("decode_head", "auxiliary_head")
        if (head := getattr(segmentor, name, None)) is not None
    ]
    return [part for head in found for part in (head if isinstance(head, nn.ModuleList) else [head])]


def losses_of(head: BaseDecodeHead) -> list[nn.Module]:
    """The losses of a head of mmseg's, which holds one, or a list of them."""
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]


def head_outputs(
    segmentor: nn.Module, features: Sequence[Tensor], but: Collection[nn.Module] = ()
) -> Iterator[tuple[nn.Module, Any]]:
    """Each head, but for some, with what it puts out. In a cascade, a head takes the output of the one before, as mmseg's evaluation has it.

    features: the maps of the backbone, or of the neck where there is one.
    """
    cascade = segmentor.decode_head if isinstance(segmentor.decode_head, nn.ModuleList) else ()
    previous: Any = None
    for head in heads(segmentor):
        if head in but:
            continue
        if head in list(cascade)[1:]:
            previous = head.forward_test(features, previous, [], segmentor.test_cfg)
            yield head, previous
        else:
            output = head(features)
            previous = output if head in cascade else previous
            yield head, output


def evaluate_by_call(segmentor: nn.Module) -> None:
    """Gives a decode head that has mmseg's own `forward_test` a subclass of its class, whose one calls the head and not its forward: the hooks by
    which ZeRO-3 gathers the parameters that a head reads itself run then, too."""
    head = segmentor.decode_head
    if isinstance(head, BaseDecodeHead) and type(head).forward_test is BaseDecodeHead.forward_test:
        head.__class__ = _called_class(type(head))


@functools.cache
def _called_class(head_class: type[BaseDecodeHead]) -> type[BaseDecodeHead]:
    def forward_test(self: BaseDecodeHead, inputs: Sequence[Tensor], img_metas: Any, test_cfg: Any) -> Tensor:
        return self(inputs)

    return derived_class(head_class, {"forward_test": forward_test})


def stand_in_loss(segmentor: nn.Module, features: Sequence[Tensor], labels: Tensor) -> Tensor:
    """A scalar that takes the memory of the losses of all heads, on tensors that may have no values (planning).

    features: as `head_outputs` takes them. labels: (b, h, w) int64. A head that computes no loss of pixels says itself what stands in, by a method
    `stand_in_loss(features, labels)`; of the others, which bring logits to the size of the labels, it is a cross entropy of each (b, classes, h, w)
    that they put out.
    """
    own = [head for head in heads(segmentor) if hasattr(head, "stand_in_loss")]
    total = sum(head.stand_in_loss(features, labels) for head in own)
    for _, output in head_outputs(segmentor, features, but=own):
        maps = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim() == 4)
        total = total + sum(
            F.cross_entropy(F.interpolate(logits, size=labels.shape[1:], mode="bilinear"), labels)
            for logits in maps
        )
    return total
