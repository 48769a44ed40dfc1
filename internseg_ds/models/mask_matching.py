"""Which query of an image stands for which of its masks: bipartite matching of least cost, on a random sample of points.

In: class scores and mask logits of all decoder layers, and the masks of each image. Out: pairs of queries and masks. Costs are computed where the tensors are
and copied to the CPU once, for all layers and images; the assignments are scipy's (the Hungarian method). Sources: Carion et al., "DETR", 2020, section 3.1;
Cheng et al., "Masked-attention Mask Transformer", 2022, section 3.3, for the points.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmcv.ops import point_sample
from scipy.optimize import linear_sum_assignment
from torch import Tensor

LIMIT = 1e4
"""Logits beyond it cost as much as this one: one that is not finite must end in a skipped step, with a loss to show, not in an assignment that fails."""
MASKS_AT_ONCE = 16
"""That are turned into fp32 at the image's size, to sample from: 50 MB at 896 x 896."""


class Matches(NamedTuple):
    """Pairs of one decoder layer: image, query of that image, and mask, counted through all images of the batch. Each (pairs) int64."""

    image: Tensor
    query: Tensor
    target: Tensor


@torch.no_grad()
def match(
    costs: Any,
    points: int,
    all_scores: Sequence[Tensor],
    all_masks: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    gt_masks: Sequence[Tensor],
    *,
    assign: bool = True,
) -> list[Matches]:
    """The matches of each layer: as many pairs as the image has masks, or queries where these are fewer.

    costs: an assigner of mmdet, with cls_cost, mask_cost and dice_cost. points: at which masks are compared, others for each layer and image. all_scores:
    of each layer (b, queries, classes + 1); all_masks: (b, queries, h, w). gt_labels, gt_masks: of each image (n) and (n, H, W). assign: False leaves it at the
    costs, and returns nothing.
    """
    found = []
    for scores, masks in zip(all_scores, all_masks, strict=True):
        for image, (labels, targets) in enumerate(zip(gt_labels, gt_masks, strict=True)):
            places = torch.rand(1, points, 2, device=masks.device)
            logits = (
                sampled(masks[image], places.expand(masks.size(1), -1, -1))
                .nan_to_num(0.0)
                .clamp(-LIMIT, LIMIT)
            )
            wanted = sampled_targets(
                targets,
                torch.arange(len(targets), device=targets.device),
                places.expand(len(targets), -1, -1),
            )
            chosen = scores[image].nan_to_num(0.0).clamp(-LIMIT, LIMIT)
            found.append(
                (
                    costs.cls_cost(chosen, labels)
                    + costs.mask_cost(logits, wanted)
                    + costs.dice_cost(logits, wanted)
                ).flatten()
            )
    if not assign:
        return []
    queries, sizes = all_scores[0].size(1), [len(labels) for labels in gt_labels]
    costs_of = iter(torch.cat(found).cpu().split([queries * size for _ in all_scores for size in sizes]))
    first = [sum(sizes[:image]) for image in range(len(sizes))]
    pairs: list[list[tuple[int, int, int]]] = [[] for _ in all_scores]
    for layer in pairs:
        for image, size in enumerate(sizes):
            rows, columns = linear_sum_assignment(next(costs_of).view(queries, size).numpy())
            layer.extend(
                (image, int(row), first[image] + int(column))
                for row, column in zip(rows, columns, strict=True)
            )
    indices = (
        torch.tensor(pairs, dtype=torch.int64)
        .view(len(pairs), -1, 3)
        .to(all_scores[0].device, non_blocking=True)
    )
    return [Matches(*layer.unbind(1)) for layer in indices]


def sampled(masks: Tensor, points: Tensor) -> Tensor:
    """masks (n, h, w) at points (n, points, 2) in [0, 1], horizontal first, bilinear and 0 outside -> (n, points)."""
    return point_sample(masks[:, None], points)[:, 0]


def sampled_targets(targets: Tensor, chosen: Tensor, points: Tensor) -> Tensor:
    """`sampled` of the binary masks targets[chosen], some at a time. targets (n, H, W) of 0 and 1; chosen (m); points (m, points, 2) -> (m, points) fp32."""
    parts = zip(chosen.split(MASKS_AT_ONCE), points.split(MASKS_AT_ONCE), strict=True)
    return torch.cat([sampled(targets[some].float(), places) for some, places in parts])
