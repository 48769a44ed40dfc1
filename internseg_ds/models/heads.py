"""The heads of a segmentor, as mmseg's segmentors hold them: decode_head (in cascades a list) and
auxiliary_head (one, a list, or none).

Letters: b images, (h, w) a feature map's or an image's size.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from internseg_ds.models.derived_class import ModuleClass, derived_class, once_per_class
from internseg_ds.torch_internals import tree_leaves


def heads(segmentor: nn.Module) -> list[nn.Module]:
    """All heads that run in training."""
    found: list[nn.Module] = []
    for name in ("decode_head", "auxiliary_head"):
        head = getattr(segmentor, name, None)
        if isinstance(head, nn.ModuleList):
            found.extend(head)
        elif head is not None:
            found.append(head)
    return found


def losses_of(head: BaseDecodeHead) -> list[nn.Module]:
    """The losses of one of mmseg's heads, which holds one loss or a list of them."""
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]


def head_outputs(
    segmentor: EncoderDecoder, features: Sequence[Tensor], exclude: Collection[nn.Module] = ()
) -> Iterator[tuple[nn.Module, Any]]:
    """Run the heads, except those in `exclude`, and yield each with its output.

    features: maps (b, c_i, h_i, w_i) of the backbone, or of the neck where there is one. The output is what
    the head returns, for most of mmseg's logits (b, classes, h, w). In a cascade, a head takes the output of
    the one before, as in mmseg's evaluation.
    """
    cascade = segmentor.decode_head if isinstance(segmentor.decode_head, nn.ModuleList) else ()
    previous: Any = None
    remaining: list[Any] = [head for head in heads(segmentor) if head not in exclude]
    for head in remaining:
        if head in list(cascade)[1:]:
            previous = head.forward_test(features, previous, [], segmentor.test_cfg)
            yield head, previous
        else:
            output = head(features)
            previous = output if head in cascade else previous
            yield head, output


def evaluate_by_call(segmentor: EncoderDecoder) -> None:
    """Let a decode head that has mmseg's own `forward_test` evaluate by calling the module, `head(...)`.

    mmseg's calls `head.forward(...)`, which runs no hooks. ZeRO-3 gathers the parameters that a head owns
    itself in such a hook.
    """
    head = segmentor.decode_head
    if isinstance(head, BaseDecodeHead) and type(head).forward_test is BaseDecodeHead.forward_test:
        head.__class__ = _evaluated_by_call(type(head))


@once_per_class
def _evaluated_by_call(head_class: ModuleClass) -> ModuleClass:
    def forward_test(self: nn.Module, inputs: Sequence[Tensor], img_metas: Any, test_cfg: Any) -> Tensor:
        """inputs: maps (b, c_i, h_i, w_i) -> logits (b, classes, h, w)."""
        return self(inputs)

    return derived_class(head_class, {"forward_test": forward_test})


def stand_in_loss(segmentor: EncoderDecoder, features: Sequence[Tensor], labels: Tensor) -> Tensor:
    """A scalar whose computation takes the memory of the losses of all heads, for the memory estimate.

    Runs on tensors that may have no values. features: as `head_outputs` takes them. labels: (b, h, w) int64.
    A head whose loss is not one per pixel brings its own `stand_in_loss(features, labels)`; for each of the
    others it is the cross entropy of every output (b, classes, h', w'), resized to the size of the labels.
    """
    own: list[Any] = [head for head in heads(segmentor) if hasattr(head, "stand_in_loss")]
    total = sum(head.stand_in_loss(features, labels) for head in own)
    for _, output in head_outputs(segmentor, features, exclude=own):
        maps = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim() == 4)
        total = total + sum(
            F.cross_entropy(F.interpolate(logits, size=labels.shape[1:], mode="bilinear"), labels)
            for logits in maps
        )
    return total
