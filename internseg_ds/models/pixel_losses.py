"""mmseg's losses of pixels without its waits for the GPU: the share of pixels that a head gets right is counted on the device.

mmseg's `accuracy` sorts the scores of all classes for each pixel, and picks pixels by value, for which the host waits four times per micro-batch and head.
Losses, their names and values are mmseg's; of images that are ignored as a whole, where mmseg's Lovász and binary losses are no number, or raise, they are 0.
"""

import functools
from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss, LovaszLoss
from mmseg.ops import resize
from torch import Tensor, nn

from internseg_ds.models.derived_class import derived_class
from internseg_ds.models.heads import heads, losses_of


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
    """Gives every head that has mmseg's own `losses` a subclass of its class, whose accuracy is `pixel_accuracy`. Heads with losses of their own stay. Losses
    that cannot take an image without a pixel that counts become ones that can."""
    for head in heads(segmentor):
        if isinstance(head, BaseDecodeHead) and type(head).losses is BaseDecodeHead.losses:
            head.__class__ = _counting_class(type(head))
    for module in segmentor.modules():
        if type(module) is LovaszLoss:
            module.__class__ = LovaszOfAnyImages
        elif type(module) is CrossEntropyLoss and module.use_sigmoid:
            module.__class__ = BinaryCrossEntropyOfAnyImages


class LovaszOfAnyImages(LovaszLoss):
    """0 for an image whose pixels are all ignored. It waits for the GPU, as mmseg's does for each class."""

    def forward(
        self, cls_score: Tensor, label: Tensor, *args: Any, ignore_index: int | None = 255, **kwargs: Any
    ) -> Tensor:
        counted = (label != ignore_index).flatten(1).any(1)
        if not counted.any():
            return 0 * cls_score.sum()
        found = super().forward(
            cls_score[counted], label[counted], *args, ignore_index=ignore_index, **kwargs
        )
        share = (
            counted.float().mean() if self.per_image and self.reduction == "mean" else 1
        )  # mmseg's mean is over all images
        return found * share


class BinaryCrossEntropyOfAnyImages(CrossEntropyLoss):
    """0 where there is one channel and all pixels are ignored: mmseg looks for the highest label among none. Of other channels it is mmseg's."""

    def forward(
        self, cls_score: Tensor, label: Tensor, *args: Any, ignore_index: int = -100, **kwargs: Any
    ) -> Tensor:
        if cls_score.size(1) == 1 and not (label != ignore_index).any():
            return 0 * cls_score.sum()
        return super().forward(cls_score, label, *args, ignore_index=ignore_index, **kwargs)


def has_mmsegs_losses(head: BaseDecodeHead) -> bool:
    """Whether a head's `losses` are mmseg's own, with or without our way of counting."""
    return type(head).losses is BaseDecodeHead.losses or hasattr(type(head), "counts_on_the_device")


@functools.cache
def _counting_class(head_class: type[BaseDecodeHead]) -> type[BaseDecodeHead]:
    def losses(self: BaseDecodeHead, seg_logit: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
        """seg_logit (b, classes, h, w); seg_label (b, 1, H, W) int64. Each loss of the head at the labels' size under its name, and acc_seg."""
        scores = resize(
            seg_logit, size=seg_label.shape[2:], mode="bilinear", align_corners=self.align_corners
        )
        weight = self.sampler.sample(scores, seg_label) if self.sampler is not None else None
        labels, found = seg_label.squeeze(1), {}
        for loss in losses_of(self):
            value = loss(scores, labels, weight=weight, ignore_index=self.ignore_index)
            found[loss.loss_name] = found[loss.loss_name] + value if loss.loss_name in found else value
        return found | {"acc_seg": pixel_accuracy(scores, labels, self.ignore_index)}

    return derived_class(head_class, {"losses": losses, "counts_on_the_device": True})
