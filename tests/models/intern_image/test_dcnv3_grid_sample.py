"""DCNv3 by grid_sample is the operator, whatever kernel, stride and dilation."""

import pytest
import torch

from internseg_ds.models.intern_image import dcnv3_grid_sample
from tests.models.intern_image.dcnv3_reference import CASES, dcnv3_by_loops, tensors


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop(case: str):
    arguments = CASES[case][-1]
    inputs = tensors(case)
    expected = dcnv3_by_loops(*inputs, *arguments)
    torch.testing.assert_close(dcnv3_grid_sample.dcnv3(*inputs, *arguments), expected, rtol=0, atol=1e-12)
