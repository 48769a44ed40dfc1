"""What heads whose queries predict one mask and one class each have in common: their losses, the scores of
pixels, and what the memory estimate needs (Cheng et al., "Masked-attention Mask Transformer", 2022).

In: class scores and mask logits of all layers of a head; for training, the binary masks and classes of each
image. Out: losses of every layer, or scores of pixels. No shape depends on a value (the host need not wait
for the GPU, and memory estimates need no values), the assignments of all layers are computed on the CPU at
once, and masks at the image's size are sampled a few at a time.

Letters: b images, q queries, (h_0, w_0) size of the predicted masks, (H, W) of the images, n masks of an
image or of all images, p sampled points of a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.core import reduce_mean
from mmdet.models.utils import get_uncertain_point_coords_with_randomness
from torch import Tensor

from internseg_ds.models.layers import vector_on_device, without_autocast
from internseg_ds.models.mask2former.mask_matching import (
    Matches,
    match,
    matching_costs,
    sampled,
    sampled_targets,
)

PLANNED_MASKS = 32
"""Masks of an image in the memory estimate. An image of ADE20K has some ten classes, and seldom more than
30."""


@dataclass(frozen=True)
class Truth:
    """What the losses of all layers are computed against."""

    labels: Tensor
    """(n) int64: the classes of the masks of all images."""
    masks: Tensor
    """(n, H, W) of 0 and 1, any dtype."""
    count: Tensor
    """A scalar: number of masks, the mean over ranks, at least 1."""
    class_weights: Tensor
    """(num_classes + 1)."""


class MaskLosses:
    """A part of a head, which is a module and has the attributes below. Called with features, the head
    returns class scores (b, q, num_classes + 1) and mask logits (b, q, h_0, w_0): a list of each, one entry
    for each layer that is trained, the last one the head's prediction.

    The mask losses are divided by the number of masks of one micro-batch over all ranks: with gradient
    accumulation by those of each micro-batch, without it by those of the whole step. So they depend, a
    little, on how a global batch is split.
    """

    threshold = None
    """mmseg's attribute, of binary segmentation; mmseg's test code reads it of every head."""

    num_classes: int
    """Without "no object"."""
    num_queries: int
    class_weight: Sequence[float]
    """num_classes + 1 numbers, the last one for "no object"."""
    loss_cls: Any
    loss_mask: Any
    loss_dice: Any
    assigner: Any
    """mmdet's, whose costs are used."""
    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float

    def forward_train(
        self,
        features: Sequence[Tensor],
        img_metas: Any,
        gt_semantic_seg: Tensor,
        gt_labels: Sequence[Tensor],
        gt_masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """features: as the head takes them. Of each image gt_labels (n) int64, the classes of its masks, and
        gt_masks (n, H, W) of 0 and 1, any dtype; n may be 0. gt_semantic_seg and img_metas are not used.

        Returns loss_cls, loss_mask and loss_dice of the last layer, and d0.loss_cls ... of those before,
        scalars. Collective: masks are counted over all ranks.
        """
        with without_autocast(features[0]):
            return self.losses(*self._predictions(features), gt_labels, gt_masks)

    def losses(
        self,
        all_scores: Sequence[Tensor],
        all_masks: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        gt_masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of these predictions, one entry for each layer; otherwise as of `forward_train`."""
        matches = match(self.assigner, self.num_points, all_scores, all_masks, gt_labels, gt_masks)
        count = reduce_mean(all_scores[0].new_full((), matches[0].image.numel())).clamp(min=1)
        truth = Truth(
            torch.cat(list(gt_labels)),
            torch.cat(list(gt_masks)),
            count,
            vector_on_device(self.class_weight, all_scores[0]),
        )
        layers = [self._losses(*layer, truth) for layer in zip(all_scores, all_masks, matches, strict=True)]
        losses = dict(layers[-1])
        for index, layer in enumerate(layers[:-1]):
            losses |= {f"d{index}.{name}": loss for name, loss in layer.items()}
        return losses

    def _predictions(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        head: Any = self
        return head(features)

    def _losses(self, scores: Tensor, masks: Tensor, matches: Matches, truth: Truth) -> dict[str, Tensor]:
        """Losses of one layer: loss_cls, loss_mask and loss_dice, scalars.

        scores: (b, q, num_classes + 1), masks: (b, q, h_0, w_0). Where no image has a mask, the mask losses
        are 0, and their modules run all the same: under ZeRO-3 all ranks must run the same modules in the
        same order.
        """
        found = masks[matches.image, matches.query]  # (b, q, h_0, w_0) -> (n, h_0, w_0)
        with torch.no_grad():
            points = self._points(found)
            wanted_values = sampled_targets(truth.masks, matches.target, points)
        values = sampled(found, points)  # (n, h_0, w_0) -> (n, p)
        return {
            "loss_cls": self._class_loss(scores, matches, truth),
            "loss_mask": self.loss_mask(
                values.flatten(), wanted_values.flatten(), avg_factor=truth.count * self.num_points
            ),
            "loss_dice": self.loss_dice(values, wanted_values, avg_factor=truth.count),
        }

    def _class_loss(self, scores: Tensor, matches: Matches, truth: Truth) -> Tensor:
        """scores: (b, q, num_classes + 1). Returns a scalar."""
        wanted = torch.full(scores.shape[:2], self.num_classes, dtype=torch.int64, device=scores.device)
        wanted[matches.image, matches.query] = truth.labels[matches.target]  # the others: no object
        # mmdet's loss copies its list of class weights to the device in every call, for which the host waits.
        # The function that it calls takes a tensor.
        return self.loss_cls.loss_weight * self.loss_cls.cls_criterion(
            scores.flatten(0, 1),
            wanted.flatten(),
            torch.ones_like(wanted.flatten()),
            class_weight=truth.class_weights,
            reduction=self.loss_cls.reduction,
            avg_factor=truth.class_weights[wanted].sum(),
        )

    def _points(self, masks: Tensor) -> Tensor:
        """masks: logits (n, h_0, w_0) -> where they are compared with the truth, mostly where they are
        uncertain: (n, p, 2) in [0, 1], horizontal first."""
        if len(masks) == 0:  # mmdet's function cannot take none
            return masks.new_zeros(0, self.num_points, 2)
        return get_uncertain_point_coords_with_randomness(
            masks[:, None], None, self.num_points, self.oversample_ratio, self.importance_sample_ratio
        )

    def forward_test(self, features: Sequence[Tensor], img_metas: Any = None, test_cfg: Any = None) -> Tensor:
        """features: as the head takes them. Returns scores of pixels (b, num_classes, h_0, w_0): the sum over
        the last layer's queries of class probability times mask probability. img_metas and test_cfg are not
        used."""
        with without_autocast(features[0]):
            all_scores, all_masks = self._predictions(features)
            return torch.einsum(
                "bqc,bqhw->bchw", all_scores[-1].softmax(-1)[..., :-1], all_masks[-1].sigmoid()
            )

    def stand_in_loss(self, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        """For the memory estimate, on tensors without values: compute and keep what `forward_train` does for
        images of PLANNED_MASKS classes, with queries matched in their order.

        features: as the head takes them. labels: (b, H, W) int64. Returns a scalar.
        """
        with without_autocast(features[0]):
            all_scores, all_masks = self._predictions(features)
            images = len(labels)
            each = min(PLANNED_MASKS, self.num_queries)
            numbers = torch.arange(images * each, device=labels.device)
            matches = Matches(numbers // each, numbers % each, numbers)
            classes = labels.new_zeros(images * each)
            targets = labels.new_empty(images * each, *labels.shape[1:], dtype=torch.uint8)
            matching_costs(
                self.assigner,
                self.num_points,
                all_scores,
                all_masks,
                classes.split(each),
                targets.split(each),
            )
            total = all_scores[0].new_zeros(())
            for scores, masks in zip(all_scores, all_masks, strict=True):
                weights = vector_on_device(self.class_weight, scores)
                truth = Truth(classes, targets, scores.new_ones(()), weights)
                total = total + sum(self._losses(scores, masks, matches, truth).values())
            return total
