import math

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention

from internseg_ds.models import deformable_attention
from internseg_ds.models.deformable_attention import DeformableAttention, attend

SHAPES = [(3, 5), (6, 4), (2, 2)]
TOKENS = sum(height * width for height, width in SHAPES)


def inputs(batch: int = 2, queries: int = 7, heads: int = 2, width: int = 3, points: int = 4, dtype=torch.float64):
    torch.manual_seed(0)
    value = torch.randn(batch, TOKENS, heads, width, dtype=dtype, requires_grad=True)
    locations = (torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=dtype) * 1.4 - 0.2).requires_grad_()  # some outside
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, dtype=dtype, requires_grad=True)
    return value, locations, weights


def loop(value, locations, weights):
    """Equation 3 of Deformable DETR, one sample and one neighbour at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.size(-1), dtype=value.dtype)
    for b, q, head, level, point in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads, levels, points))).tolist():
        height, width = SHAPES[level]
        start = sum(h * w for h, w in SHAPES[:level])
        column, row = (float(locations[b, q, head, level, point, axis]) * size - 0.5 for axis, size in ((0, width), (1, height)))
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < height and 0 <= j < width:
                    near = (1 - abs(row - i)) * (1 - abs(column - j))
                    out[b, q, head] += weights[b, q, head, level, point] * near * value[b, start + i * width + j, head]
    return out.flatten(2)


def test_samples_are_those_of_an_independent_loop():
    value, locations, weights = inputs()
    with torch.no_grad():
        torch.testing.assert_close(attend(value, SHAPES, locations, weights), loop(value, locations, weights))


def test_gradients_are_those_of_finite_differences():
    value, locations, weights = inputs(batch=1, queries=2, width=2, points=2)
    assert torch.autograd.gradcheck(lambda *tensors: attend(tensors[0], SHAPES, *tensors[1:]), (value, locations, weights))


def test_samples_taken_a_few_queries_at_a_time_are_the_same_and_so_are_gradients(monkeypatch):
    results = []
    for limit in (2**26, 30_000):  # all; 19 queries of 150 at a time
        monkeypatch.setattr(deformable_attention, "SAMPLED_AT_ONCE", limit)
        tensors = inputs(queries=150, width=48)
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attend(tensors[0], SHAPES, *tensors[1:])
        results.append((sum(storage.nbytes() for storage in saved.values()), out, *torch.autograd.grad(out.square().sum(), tensors)))
    (saved_at_once, *plain), (saved_in_parts, *chunked) = results
    for one, other in zip(plain, chunked, strict=True):
        torch.testing.assert_close(one, other)
    assert saved_in_parts < saved_at_once / 4


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_module_is_mmcvs(batch_first):
    torch.manual_seed(0)
    arguments = dict(embed_dims=12, num_heads=2, num_levels=3, dropout=0.0, batch_first=batch_first)
    ours, theirs = (kind(**arguments) for kind in (DeformableAttention, MultiScaleDeformableAttention))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.sampling_offsets.bias, theirs.sampling_offsets.bias)
    for param in ours.parameters():
        torch.nn.init.normal_(param, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    query, position = torch.randn(TOKENS, 2, 12), torch.randn(TOKENS, 2, 12)
    if batch_first:
        query, position = query.transpose(0, 1), position.transpose(0, 1)
    points = torch.rand(2, TOKENS, 3, 2)
    shapes = torch.tensor(SHAPES)
    expected = theirs(query, query_pos=position, reference_points=points, spatial_shapes=shapes, level_start_index=None)
    torch.testing.assert_close(ours(query, query_pos=position, reference_points=points, spatial_shapes=SHAPES), expected, rtol=1e-4, atol=1e-5)
