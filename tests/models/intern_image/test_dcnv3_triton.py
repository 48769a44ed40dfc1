"""The Triton kernels of DCNv3 in Triton's interpreter, which runs them on a CPU, against a loop in fp64;
compiled ones on a GPU, where there is one.

`test_triton_compiles.py` compiles them, which needs no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.intern_image.dcnv3_reference import CASES, dcnv3_by_loops, gradients_by_loops, tensors

pytest.importorskip("triton")

RUN = """
import sys, torch
from internseg_ds.models.intern_image import dcnv3_triton
from internseg_ds.models.intern_image.dcnv3_geometry import Geometry
calls, results = torch.load(sys.argv[1]), []
for grad, *inputs, arguments in calls:
    made = Geometry(*arguments)
    results.append((dcnv3_triton.forward(*inputs, made), *dcnv3_triton.backward(grad, *inputs, made)))
torch.save(results, sys.argv[2])
"""
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
DTYPES = (torch.float32, torch.bfloat16)


def call(case: str, dtype: torch.dtype) -> tuple:
    """The gradient of a result, the input, offsets, masks and arguments: features in `dtype`, offsets and
    masks in fp32."""
    x, offset, mask = tensors(case)
    grad = torch.randn(*mask.shape[:3], x.size(3))
    return grad.to(dtype), x.to(dtype), offset.float(), mask.float(), CASES[case][-1]


def with_offset(wrong: float, axis: int) -> tuple:
    """A call in fp32 with one offset, of the first group at one position, that is not finite."""
    grad, x, offset, mask, arguments = call("plain", torch.float32)
    offset[0, 2, 3, 4 + axis] = wrong
    return grad, x, offset, mask, arguments


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, object], tuple]:
    """What the kernels make of each case, and of each offset that is not finite, by (its text, axis).

    In a process of its own: Triton reads the variable when it is imported.
    """
    folder, keys = tmp_path_factory.mktemp("triton"), [(case, dtype) for case in CASES for dtype in DTYPES]
    wrong = {(str(value), axis): with_offset(value, axis) for value in NOT_FINITE for axis in (0, 1)}
    torch.save([*(call(*key) for key in keys), *wrong.values()], folder / "calls.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder / "calls.pt", folder / "results.pt"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip([*keys, *wrong], torch.load(folder / "results.pt"), strict=True))


def check(results: tuple, case: str, dtype: torch.dtype) -> None:
    grad, *inputs, arguments = call(case, dtype)
    exact = [tensor.double() for tensor in inputs]
    wanted = dcnv3_by_loops(*exact, *arguments), *gradients_by_loops(grad.double(), *exact, *arguments)
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32, torch.float32]
    for result, expected in zip(results, wanted):
        rtol = 2**-7 if result.dtype == torch.bfloat16 else 1e-5  # the interpreter cuts bf16 off
        torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_agree_with_a_loop(interpreted: dict, case: str, dtype: torch.dtype):
    check(interpreted[case, dtype], case, dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_an_offset_that_is_not_finite_shows_in_result_and_gradients(
    interpreted: dict, wrong: float, axis: int
):
    out, _, of_offset, of_mask = interpreted[str(wrong), axis]
    assert out[0, 2, 3, :5].isnan().all() and out.isnan().sum() == 5  # the channels of its group
    assert (
        of_offset[0, 2, 3, 4:6].isnan().any() and of_mask[0, 2, 3, 2].isnan() and not of_mask[1].isnan().any()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_compiled_kernels_agree_with_a_loop(case: str, dtype: torch.dtype):
    from internseg_ds.models.intern_image import dcnv3_operator

    grad, *inputs, arguments = call(case, dtype)
    leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
    assert dcnv3_operator.implementation(*leaves).__name__.endswith("dcnv3_triton")
    out = dcnv3_operator.dcnv3(*leaves, *arguments)
    check(
        tuple(tensor.detach().cpu() for tensor in (out, *torch.autograd.grad(out, leaves, grad.cuda()))),
        case,
        dtype,
    )
