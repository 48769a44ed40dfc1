"""The Triton kernels of deformable attention in Triton's interpreter, which runs them on a CPU, against a
loop in fp64 and PyTorch's sampling."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internseg_ds.models.sampling import deformable_attention_torch
from tests.models.sampling.deformable_attention_reference import attention_by_loops, with_gradients

pytest.importorskip("triton")

RUN = """
import sys, torch
from internseg_ds.models.sampling import deformable_attention_triton as kernels
calls, results = torch.load(sys.argv[1]), []
for grad, *tensors, shapes in calls:
    results.append((kernels.forward(*tensors, shapes), *kernels.backward(grad, *tensors, shapes)))
torch.save(results, sys.argv[2])
"""
CASES = {
    "three maps, as Mask2Former": (2, 5, 2, 4, 8, [(3, 5), (6, 4), (2, 2)]),
    "odd": (1, 3, 3, 3, 5, [(1, 7), (5, 1)]),
    "one map, one point": (3, 70, 1, 1, 32, [(4, 3)]),
    "five maps, one query": (1, 1, 4, 2, 16, [(2, 3), (1, 1), (3, 3), (4, 2), (16, 16)]),
}
"""Name: images, queries, heads, points, channels of a head, sizes of maps."""
DTYPES = (torch.float32, torch.bfloat16)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30)


def call(case: str, dtype: torch.dtype) -> tuple:
    """The gradient of a result, value, locations (some outside), weights and sizes of maps: features in
    `dtype`."""
    batch, queries, heads, points, channels, shapes = CASES[case]
    torch.manual_seed(0)
    places = batch, queries, heads, len(shapes), points
    grad, value = (
        torch.randn(batch, queries, heads * channels),
        torch.randn(batch, sum(h * w for h, w in shapes), heads, channels),
    )
    return grad.to(dtype), value.to(dtype), torch.rand(*places, 2) * 1.6 - 0.3, torch.rand(places), shapes


def with_location(wrong: float, axis: int) -> tuple:
    """A call in which one location, of the second query's first head in the second map, is wrong."""
    grad, value, locations, weights, shapes = call("three maps, as Mask2Former", torch.float32)
    locations[0, 1, 0, 1, 2, axis] = wrong
    return grad, value, locations, weights, shapes


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, object], tuple]:
    """What the kernels make of each case, and of each wrong location, by (its text, axis). In a process of
    its own: Triton reads the variable when it is imported."""
    folder, calls = (
        tmp_path_factory.mktemp("triton"),
        {(case, dtype): call(case, dtype) for case in CASES for dtype in DTYPES},
    )
    calls |= {(str(value), axis): with_location(value, axis) for value in NOT_FINITE for axis in (0, 1)}
    torch.save(list(calls.values()), folder / "calls.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder / "calls.pt", folder / "results.pt"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_agree_with_a_loop_and_with_pytorch(
    interpreted: dict, case: str, dtype: torch.dtype
):
    grad, value, locations, weights, shapes = call(case, dtype)
    results = interpreted[case, dtype]
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32, torch.float32]
    wanted = with_gradients(
        attention_by_loops, value.double(), shapes, locations.double(), weights.double(), grad.double()
    )
    torchs = (
        deformable_attention_torch.forward(value, locations, weights, shapes),
        *deformable_attention_torch.backward(grad, value, locations, weights, shapes),
    )
    for result, other, expected in zip(results, torchs, wanted, strict=True):
        rtol = 2**-7 if result.dtype == torch.bfloat16 else 1e-4  # the interpreter cuts bf16 off
        torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=1e-4)
        torch.testing.assert_close(other.double(), expected, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_a_location_that_is_not_finite_shows_and_one_far_outside_counts_for_nothing(
    interpreted: dict, wrong: float, axis: int
):
    out, of_value, of_locations, of_weights = interpreted[str(wrong), axis]
    if abs(wrong) == 1e30:
        grad, value, locations, weights, shapes = with_location(wrong, axis)
        wanted = with_gradients(
            attention_by_loops, value.double(), shapes, locations.double(), weights.double(), grad.double()
        )
        for result, expected in zip((out, of_value, of_locations, of_weights), wanted, strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    else:
        assert out[0, 1, :8].isnan().all() and out.isnan().sum() == 8  # the channels of its head
        assert (
            of_weights[0, 1, 0, 1, 2].isnan() and of_weights.isnan().sum() == 1 and not of_value.isnan().any()
        )
        assert of_locations[0, 1, 0, 1, 2].isnan().any() and of_locations.isnan().sum() <= 2
