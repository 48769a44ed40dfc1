import itertools
from types import SimpleNamespace

import pytest
import torch

from internseg_ds.models.mask2former.mask_matching import match, sampled_targets


def costs() -> SimpleNamespace:
    from mmdet.core.bbox.match_costs import ClassificationCost, CrossEntropyLossCost, DiceCost

    return SimpleNamespace(
        cls_cost=ClassificationCost(weight=2.0),
        mask_cost=CrossEntropyLossCost(weight=5.0),
        dice_cost=DiceCost(weight=5.0, pred_act=True, eps=1.0),
    )


def blocks(count: int) -> torch.Tensor:
    """Masks of some rows each, (count, 12, 12)."""
    masks = torch.zeros(count, 12, 12, dtype=torch.uint8)
    for index in range(count):
        masks[index, index * (12 // count) : (index + 1) * (12 // count)] = 1
    return masks


@pytest.mark.parametrize(("queries", "masks"), [(5, 3), (4, 4), (2, 4)])
def test_matches_cost_least_of_all_there_are(queries, masks):
    torch.manual_seed(0)
    scores, logits = torch.randn(1, queries, 7), torch.randn(1, queries, 12, 12)
    labels, targets = torch.arange(masks), blocks(masks)
    torch.manual_seed(1)
    (found,) = match(costs(), 4000, [scores], [logits], [labels], [targets])
    assert (
        len(found.query)
        == min(queries, masks)
        == len(set(found.query.tolist()))
        == len(set(found.target.tolist()))
    )
    torch.manual_seed(1)  # the same points
    places = torch.rand(1, 4000, 2)
    from mmcv.ops import point_sample

    seen, wanted = (
        point_sample(value[:, None].float(), places.expand(len(value), -1, -1))[:, 0]
        for value in (logits[0], targets)
    )
    matrix = (
        costs().cls_cost(scores[0], labels)
        + costs().mask_cost(seen, wanted)
        + costs().dice_cost(seen, wanted)
    )
    pairs = min(queries, masks)
    least = min(
        sum(matrix[query, target] for query, target in zip(some, others, strict=True))
        for some in itertools.permutations(range(queries), pairs)
        for others in itertools.combinations(range(masks), pairs)
    )
    torch.testing.assert_close(matrix[found.query, found.target].sum(), least)


def test_queries_that_show_the_masks_get_them_in_every_layer_and_image():
    labels, targets = (
        [torch.tensor([4, 1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 3])],
        [blocks(3), blocks(1)[:0], blocks(2)],
    )
    order = [torch.tensor([2, 0, 1]), None, torch.tensor([1, 3])]  # the query of each mask
    scores, logits = torch.zeros(3, 4, 6), torch.full((3, 4, 12, 12), -5.0)
    for image in (0, 2):
        scores[image, order[image], labels[image]] = 8.0
        logits[image, order[image]] += 10.0 * targets[image]
    for found in match(costs(), 500, [scores, scores], [logits, logits], labels, targets):
        pairs = sorted(zip(found.image.tolist(), found.target.tolist(), found.query.tolist(), strict=True))
        # masks are counted through the batch
        assert pairs == [(0, 0, 2), (0, 1, 0), (0, 2, 1), (2, 3, 1), (2, 4, 3)]


def test_what_is_not_finite_is_matched_all_the_same():
    scores, logits = torch.randn(1, 4, 6), torch.randn(1, 4, 12, 12)
    scores[0, 1], logits[0, 2], logits[0, 3, 0, 0] = float("nan"), float("inf"), float("-inf")
    (found,) = match(costs(), 100, [scores], [logits], [torch.tensor([0, 1, 2])], [blocks(3)])
    assert sorted(found.target.tolist()) == [0, 1, 2]


def test_batches_without_any_mask_have_no_matches():
    layers = match(
        costs(),
        100,
        [torch.randn(2, 4, 6)] * 3,
        [torch.randn(2, 4, 12, 12)] * 3,
        [torch.zeros(0, dtype=torch.int64)] * 2,
        [blocks(1)[:0]] * 2,
    )
    assert len(layers) == 3
    assert all(len(indices) == 0 and indices.dtype == torch.int64 for layer in layers for indices in layer)


def test_masks_are_sampled_a_few_at_a_time_with_the_same_result():
    from mmcv.ops import point_sample

    targets, chosen, points = (
        torch.randint(2, (5, 20, 30), dtype=torch.uint8),
        torch.randint(5, (41,)),
        torch.rand(41, 9, 2),
    )
    assert torch.equal(
        sampled_targets(targets, chosen, points), point_sample(targets[chosen][:, None].float(), points)[:, 0]
    )
