"""mmseg's losses of pixels without its waits for the GPU: the share of pixels that a head gets right is counted on the device.

mmseg's `accuracy` sorts the scores of all classes for each pixel, and picks pixels by value, for which the host waits four times per micro-batch and head.
Losses, their names and values are mmseg's.
"""

import functools

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.ops import resize
from torch import Tensor, nn

from internseg_ds.models.heads import heads


def pixel_accuracy(scores: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Per cent of pixels whose highest score is that of their label, (1) float32; pixels labelled `ignore_index` are left out. What mmseg's `accuracy` says
    (`models/losses/accuracy.py`), where no two classes score the same.

    scores (b, classes, h, w); labels (b, h, w) int64.
    """
    counted = labels != ignore_index
    right = (scores.argmax(1) == labels) & counted
    eps = torch.finfo(torch.float32).eps  # mmseg's: 100 % where nothing counts
    return (100 * (right.sum().double() + eps) / (counted.sum().double() + eps)).float().view(1)


def losses_without_waits(segmentor: nn.Module) -> None:
    """Gives every head that has mmseg's own `losses` a subclass of its class, whose accuracy is `pixel_accuracy`. Heads with losses of their own stay."""
    for head in heads(segmentor):
        if isinstance(head, BaseDecodeHead) and type(head).losses is BaseDecodeHead.losses:
            head.__class__ = _counting_class(type(head))


def counts_pixels(head: nn.Module) -> bool:
    """Whether a head has mmseg's own `losses`, of pixels and the data set's classes. For segmentors that `losses_without_waits` has seen."""
    return getattr(head, "pixel_losses", False)


@functools.cache
def _counting_class(head_class: type[BaseDecodeHead]) -> type[BaseDecodeHead]:
    def losses(self: BaseDecodeHead, seg_logit: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
        """seg_logit (b, classes, h, w); seg_label (b, 1, H, W) int64. Each loss of the head at the labels' size under its name, and acc_seg."""
        scores = resize(seg_logit, size=seg_label.shape[2:], mode="bilinear", align_corners=self.align_corners)
        weight = self.sampler.sample(scores, seg_label) if self.sampler is not None else None
        labels, found = seg_label.squeeze(1), {}
        for loss in self.loss_decode if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]:
            value = loss(scores, labels, weight=weight, ignore_index=self.ignore_index)
            found[loss.loss_name] = found[loss.loss_name] + value if loss.loss_name in found else value
        return found | {"acc_seg": pixel_accuracy(scores, labels, self.ignore_index)}

    place = {"__module__": head_class.__module__, "__qualname__": head_class.__qualname__, "__doc__": head_class.__doc__}
    return type(head_class.__name__, (head_class,), place | {"losses": losses, "pixel_losses": True})
