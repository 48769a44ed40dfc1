"""What stands in for operators in exported programs computes what they do."""

import pytest
import torch
import torch.nn.functional as F

from internseg_ds.models.exporting.adaptive_pooling import adaptive_avg_pool
from internseg_ds.models.sampling import deformable_attention_torch
from tests.models.sampling.deformable_attention_reference import attention_by_loops
from tests.models.sampling.test_deformable_attention import SHAPES, inputs


@pytest.mark.parametrize("size", [(7, 11), (6, 6), (2, 5), (16, 16)])
@pytest.mark.parametrize("parts", [(1, 1), (2, 2), (3, 3), (6, 4)])
def test_pooling_is_torchs(size, parts):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(adaptive_avg_pool(x, parts), F.adaptive_avg_pool2d(x, parts))


def test_deformable_attention_in_one_piece_is_an_independent_loop():
    value, locations, weights = inputs()
    sides = [side for shape in SHAPES for side in shape]
    torch.testing.assert_close(
        deformable_attention_torch.deformable_attention(value, locations, weights, sides),
        attention_by_loops(value, SHAPES, locations, weights),
    )
