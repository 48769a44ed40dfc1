"""mmseg's per-pixel losses without host-device synchronisation: the accuracy of a head is counted on the
device.

mmseg's `accuracy` sorts the scores of all classes for each pixel and selects pixels by value, for which the
host waits for the GPU four times per micro-batch and head. Losses, their names and values stay mmseg's. For
images whose pixels are all ignored, where mmseg's Lovász and binary losses are NaN or raise, they are 0.
Letters: b images, (h, w) size of a head's output, (H, W) size of the labels.
"""

from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss, LovaszLoss
from mmseg.ops import resize
from torch import Tensor, nn

from internseg_ds.models.derived_class import ModuleClass, derived_class, once_per_class
from internseg_ds.models.heads import heads, losses_of


def pixel_accuracy(scores: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Per cent of pixels whose highest score is that of their label, (1) float32.

    scores: (b, classes, H, W), any float dtype. labels: (b, H, W) int64; pixels labelled `ignore_index` do
    not count. Equals mmseg's `accuracy` (`models/losses/accuracy.py`) where no two classes have the same
    score.
    """
    counted = labels != ignore_index
    correct = (scores.argmax(1) == labels) & counted
    eps = torch.finfo(torch.float32).eps  # mmseg's: 100 % where no pixel counts
    return (100 * (correct.sum().double() + eps) / (counted.sum().double() + eps)).float().view(1)


def losses_without_waits(segmentor: nn.Module) -> None:
    """Let the losses of a built segmentor run without waiting for the device, and on images without any
    label.

    Every head that has mmseg's own `losses` gets a subclass of its class, whose accuracy is `pixel_accuracy`;
    heads with losses of their own stay. Lovász and binary cross-entropy losses get a subclass that takes
    images whose pixels are all ignored.
    """
    for head in heads(segmentor):
        if isinstance(head, BaseDecodeHead) and type(head).losses is BaseDecodeHead.losses:
            head.__class__ = _counting_class(type(head))
    for module in segmentor.modules():
        if type(module) is LovaszLoss:
            module.__class__ = LovaszOfAnyImages
        elif type(module) is CrossEntropyLoss and module.use_sigmoid:
            module.__class__ = BinaryCrossEntropyOfAnyImages


class LovaszOfAnyImages(LovaszLoss):
    """mmseg's Lovász loss, 0 for an image whose pixels are all ignored.

    It waits for the GPU, as mmseg's does for each class.
    """

    def forward(
        self, cls_score: Tensor, label: Tensor, *args: Any, ignore_index: int = 255, **kwargs: Any
    ) -> Tensor:
        """cls_score: (b, classes, H, W); label: (b, H, W) int64. Returns a scalar."""
        labelled = (label != ignore_index).flatten(1).any(1)
        if not labelled.any():
            return 0 * cls_score.sum()
        loss = super().forward(
            cls_score[labelled], label[labelled], *args, ignore_index=ignore_index, **kwargs
        )
        # mmseg's mean is over all images, those without a label included
        share = labelled.float().mean() if self.per_image and self.reduction == "mean" else 1
        return loss * share


class BinaryCrossEntropyOfAnyImages(CrossEntropyLoss):
    """mmseg's cross entropy with `use_sigmoid`, 0 where there is one channel and all pixels are ignored:
    mmseg's takes the highest label of no pixels there, which raises. With more channels it is mmseg's."""

    def forward(
        self, cls_score: Tensor, label: Tensor, *args: Any, ignore_index: int = -100, **kwargs: Any
    ) -> Tensor:
        """cls_score: (b, classes, H, W); label: (b, H, W) int64. Returns a scalar."""
        if cls_score.size(1) == 1 and not (label != ignore_index).any():
            return 0 * cls_score.sum()
        return super().forward(cls_score, label, *args, ignore_index=ignore_index, **kwargs)


def has_mmsegs_losses(head: BaseDecodeHead) -> bool:
    """Whether a head's `losses` are mmseg's own, with mmseg's accuracy or with ours."""
    return type(head).losses is BaseDecodeHead.losses or hasattr(type(head), "counts_on_the_device")


@once_per_class
def _counting_class(head_class: ModuleClass) -> ModuleClass:
    """A subclass whose `losses` are BaseDecodeHead's but for the accuracy."""

    def losses(self: BaseDecodeHead, seg_logit: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
        """seg_logit: (b, classes, h, w); seg_label: (b, 1, H, W) int64. Returns each loss of the head at the
        labels' size by its name (losses of one name are added up), and acc_seg."""
        scores = resize(
            seg_logit, size=seg_label.shape[2:], mode="bilinear", align_corners=self.align_corners
        )
        weight = self.sampler.sample(scores, seg_label) if self.sampler is not None else None
        labels = seg_label.squeeze(1)
        found: dict[str, Tensor] = {}
        for loss in losses_of(self):
            name = str(loss.loss_name)
            value = loss(scores, labels, weight=weight, ignore_index=self.ignore_index)
            found[name] = found[name] + value if name in found else value
        return found | {"acc_seg": pixel_accuracy(scores, labels, self.ignore_index)}

    return derived_class(head_class, {"losses": losses, "counts_on_the_device": True})
