"""Which query of an image is trained on which of its masks: bipartite matching of least cost (Hungarian
method), on a random sample of points.

In: class scores and mask logits of all decoder layers, and the masks of each image. Out: pairs of queries and
masks. Costs are computed where the tensors are and copied to the CPU once, for all layers and images; the
assignments are scipy's. Letters: b images, q queries, (h, w) size of the predicted masks, (H, W) of the
images, n masks of an image, p points of a mask. Sources: Carion et al., "DETR", 2020, section 3.1; Cheng et
al., "Masked-attention Mask Transformer", 2022, section 3.3, for the points.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmcv.ops import point_sample
from scipy.optimize import linear_sum_assignment
from torch import Tensor

LIMIT = 1e4
"""Logits are clamped to +-LIMIT for the costs. scipy raises for a cost that is not finite; a training step
whose logits are not finite shall end with a loss that shows it, and be skipped."""
MASKS_AT_ONCE = 16
"""Number of masks that are converted to fp32 at the image's size, to sample from, at a time: 50 MB at 896
x 896."""


class Matches(NamedTuple):
    """Pairs of a query and a mask, of one decoder layer; each field (pairs) int64."""

    image: Tensor
    query: Tensor
    """Number of the query in that image."""
    target: Tensor
    """Number of the mask, counted through all images of the batch."""


@torch.no_grad()
def match(
    assigner: Any,
    points: int,
    all_scores: Sequence[Tensor],
    all_masks: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    gt_masks: Sequence[Tensor],
) -> list[Matches]:
    """Match queries and masks in each decoder layer: as many pairs as an image has masks, or queries where
    these are fewer.

    assigner: one of mmdet's, with cls_cost, mask_cost and dice_cost. points: p. Of each layer all_scores (b,
    q, classes + 1) and all_masks, logits (b, q, h, w). Of each image gt_labels (n) int64 and gt_masks (n, H,
    W) of 0 and 1.
    """
    costs = matching_costs(assigner, points, all_scores, all_masks, gt_labels, gt_masks)
    sizes = [len(labels) for labels in gt_labels]
    queries = all_scores[0].size(1)
    # one copy for all layers and images: each would make the host wait for the GPU
    parts = iter(torch.cat(costs).cpu().split([queries * size for _ in all_scores for size in sizes]))
    pairs = [
        [pair for image in range(len(sizes)) for pair in _assign(next(parts), queries, sizes, image)]
        for _ in all_scores
    ]
    indices = torch.tensor(pairs, dtype=torch.int64).view(len(pairs), -1, 3)
    indices = indices.to(all_scores[0].device, non_blocking=True)
    return [Matches(*layer.unbind(1)) for layer in indices]


def _assign(costs: Tensor, queries: int, sizes: Sequence[int], image: int) -> list[tuple[int, int, int]]:
    """The assignment of least cost in one image of one layer: (image, query, mask counted through the batch).

    costs: (q * n), on the CPU. sizes: n of each image.
    """
    rows, columns = linear_sum_assignment(costs.view(queries, sizes[image]).numpy())
    first = sum(sizes[:image])
    return [(image, int(row), first + int(column)) for row, column in zip(rows, columns, strict=True)]


@torch.no_grad()
def matching_costs(
    assigner: Any,
    points: int,
    all_scores: Sequence[Tensor],
    all_masks: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    gt_masks: Sequence[Tensor],
) -> list[Tensor]:
    """The cost of each pair of a query and a mask: (q * n) of each image of each layer, layer by layer.
    Arguments as of `match`. Every layer and image draws points of its own."""
    costs = []
    for scores, masks in zip(all_scores, all_masks, strict=True):
        for image, (labels, targets) in enumerate(zip(gt_labels, gt_masks, strict=True)):
            places = torch.rand(1, points, 2, device=masks.device)
            logits = _clamped(sampled(masks[image], places.expand(masks.size(1), -1, -1)))
            numbers = torch.arange(len(targets), device=targets.device)
            wanted = sampled_targets(targets, numbers, places.expand(len(targets), -1, -1))
            cost = (
                assigner.cls_cost(_clamped(scores[image]), labels)
                + assigner.mask_cost(logits, wanted)
                + assigner.dice_cost(logits, wanted)
            )
            costs.append(cost.flatten())
    return costs


def _clamped(logits: Tensor) -> Tensor:
    """logits: any shape -> the same shape and dtype, within +-LIMIT, 0 for NaN."""
    return logits.nan_to_num(0.0).clamp(-LIMIT, LIMIT)


def sampled(masks: Tensor, points: Tensor) -> Tensor:
    """masks: (n, h, w), float; points: (n, p, 2) in [0, 1], horizontal first -> the masks' values there,
    (n, p): bilinear, and 0 outside."""
    return point_sample(masks[:, None], points)[:, 0]


def sampled_targets(targets: Tensor, chosen: Tensor, points: Tensor) -> Tensor:
    """`sampled` of the binary masks targets[chosen], some at a time. targets: (n, H, W) of 0 and 1, any
    dtype; chosen: (m) int64; points: (m, p, 2) -> (m, p) float32."""
    parts = zip(chosen.split(MASKS_AT_ONCE), points.split(MASKS_AT_ONCE), strict=True)
    return torch.cat([sampled(targets[some].float(), places) for some, places in parts])
