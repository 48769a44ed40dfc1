"""The DCNv3 operator and its version out of PyTorch's operations, against a loop in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from internseg_ds.models.intern_image import dcnv3_torch
from internseg_ds.models.intern_image.dcnv3_geometry import Geometry
from internseg_ds.models.intern_image.dcnv3_operator import dcnv3, implementation
from tests.models.intern_image.dcnv3_reference import CASES, dcnv3_by_loops, gradients_by_loops, tensors

PLAIN = CASES["plain"][-1]


@pytest.mark.parametrize("case", CASES)
def test_result_and_gradients_are_those_of_a_loop(case: str):
    inputs, arguments = tensors(case), CASES[case][-1]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = dcnv3(*leaves, *arguments)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        out.detach(), dcnv3_by_loops(*(leaf.detach() for leaf in leaves), *arguments), rtol=0, atol=1e-12
    )
    for ours, wanted in zip(
        torch.autograd.grad(out, leaves, grad), gradients_by_loops(grad, *inputs, *arguments)
    ):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-11)


def test_gradients_are_the_numerical_ones():
    arguments = CASES["no center, stride, dilation"][-1]
    x, offset, mask = (
        tensor[:, :3, :3].clone().requires_grad_() for tensor in tensors("no center, stride, dilation")
    )
    height, width = Geometry(*arguments).out_size(3, 3)
    assert torch.autograd.gradcheck(
        lambda x, offset, mask: dcnv3(x, offset, mask, *arguments),
        (x, offset[:, :height, :width], mask[:, :height, :width]),
    )


@pytest.mark.parametrize("case", CASES)
def test_chunks_change_nothing(case: str):
    inputs, made = tensors(case), Geometry(*CASES[case][-1])
    whole, small = (dcnv3_torch.forward(*inputs, made, chunk) for chunk in (10**9, 60))
    torch.testing.assert_close(whole, small, rtol=0, atol=1e-13)
    grad = torch.randn_like(whole)
    for one, other in zip(
        dcnv3_torch.backward(grad, *inputs, made, 10**9), dcnv3_torch.backward(grad, *inputs, made, 60)
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_without_offsets_and_with_equal_masks_it_is_the_mean_of_the_window():
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    out = dcnv3(x, x.new_zeros(2, 6, 7, 2 * 9 * 2), x.new_full((2, 6, 7, 2 * 9), 1 / 9), *PLAIN)
    torch.testing.assert_close(
        out, F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    )


def test_bf16_features_are_sampled_at_exact_locations_and_summed_in_fp32():
    torch.manual_seed(0)
    arguments = ((1, 1), (1, 1), (0, 0), (1, 1), 1, 1.0, False)
    x = torch.randn(1, 3, 300, 4).bfloat16()
    # columns beyond 256 have a distance of 2 between the numbers of bf16
    offset = torch.rand(1, 3, 300, 2) - 0.5
    mask = torch.rand(1, 3, 300, 1)
    for offset_dtype in (torch.float32, torch.bfloat16):
        inputs = x, offset.to(offset_dtype), mask
        leaves = [tensor.requires_grad_() for tensor in inputs]
        out = dcnv3(*leaves, *arguments)
        wanted = dcnv3_by_loops(*(leaf.detach().double() for leaf in leaves), *arguments)
        assert out.dtype == torch.bfloat16
        # bf16's rounding of the result, fp32's of a location near 300
        torch.testing.assert_close(out.detach().double(), wanted, rtol=2**-8, atol=1e-4)
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, grad)
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, offset_dtype, torch.float32]
        for ours, leaf, expected in zip(
            gradients,
            leaves,
            gradients_by_loops(grad.double(), *(leaf.detach().double() for leaf in leaves), *arguments),
        ):
            rounding = 2**-8 if leaf.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(ours.double(), expected, rtol=rounding, atol=1e-4)


def test_a_location_a_whole_pixel_outside_gets_no_gradient_as_in_the_published_kernels():
    x = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    for across, along in ((-1, 0), (1, 0), (0, -1), (0, 1), (1e30, 0), (0, -1e30)):
        offset = torch.tensor([across, along], dtype=torch.float64).view(1, 1, 1, 2).requires_grad_()
        out = dcnv3(
            x,
            offset,
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
            (1, 1),
            (1, 1),
            (0, 0),
            (1, 1),
            1,
            1.0,
            False,
        )
        (grad,) = torch.autograd.grad(out.sum(), offset)
        assert out.item() == 0
        assert grad.flatten()[0 if across else 1] == 0  # only along this axis would a step change anything


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_an_offset_that_is_not_finite_shows_in_result_and_gradients_and_crashes_nothing(
    wrong: float, axis: int
):
    x, offset, mask = (tensor.float() for tensor in tensors("plain"))
    offset[0, 2, 3, 4 + axis] = wrong
    leaves = [tensor.requires_grad_() for tensor in (x, offset, mask)]
    out = dcnv3(*leaves, *PLAIN)
    assert out[0, 2, 3, :5].isnan().all() and out.isnan().sum() == 5  # the channels of its group
    _, of_offset, of_mask = torch.autograd.grad(out.sum(), leaves)
    assert (
        of_offset[0, 2, 3, 4:6].isnan().any() and of_mask[0, 2, 3, 2].isnan() and not of_mask[1].isnan().any()
    )


@pytest.mark.parametrize(
    ("dtype", "deterministic", "chosen"),
    [
        (torch.bfloat16, False, "dcnv3_triton"),
        (torch.bfloat16, True, "dcnv3_torch"),
        (torch.float64, False, "dcnv3_torch"),
    ],
)
def test_gpus_run_triton_but_for_fp64_and_where_deterministic_algorithms_are_asked_for(
    dtype: torch.dtype, deterministic: bool, chosen: str
):
    pytest.importorskip("triton")
    with FakeTensorMode():  # tensors that say they are on a GPU
        x, offset, mask = (torch.empty(1, 2, 2, 9, dtype=dtype, device="cuda") for _ in range(3))
        # as launch/train.py --deterministic does
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            assert implementation(x, offset, mask).__name__ == f"internseg_ds.models.intern_image.{chosen}"
        finally:
            torch.use_deterministic_algorithms(False)


def test_the_backward_pass_keeps_the_inputs_only():
    leaves, kept = [tensor.requires_grad_() for tensor in tensors("plain")], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        dcnv3(*leaves, *PLAIN)
    assert {tensor.data_ptr() for tensor in kept} == {leaf.data_ptr() for leaf in leaves} and len(kept) == 3


def test_torch_finds_schema_fake_and_gradient_consistent():
    leaves = [tensor.float().requires_grad_() for tensor in tensors("no center, stride, dilation")]
    torch.library.opcheck(
        dcnv3,
        (*leaves, *CASES["no center, stride, dilation"][-1]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_the_flop_counter_knows_both_passes_on_the_meta_device():
    leaves = [tensor.to("meta").requires_grad_() for tensor in tensors("plain")]
    corners = 2 * 5 * 6 * 10 * 9 * 4  # positions x channels x points x corners
    with FlopCounterMode(display=False) as counter:
        out = dcnv3(*leaves, *PLAIN)
    assert counter.get_total_flops() == 2 * corners
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 4 * corners


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5, 6, 9)}, "group=2"),
        (
            {"offset": (2, 5, 6, 35)},
            r"offset .*\(2, 5, 6, 35\).*\(2, 5, 6, 36\)",
        ),
        ({"mask": (2, 4, 6, 18)}, r"mask .*\(2, 4, 6, 18\).*\(2, 5, 6, 18\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str):
    shapes = {"x": (2, 5, 6, 10), "offset": (2, 5, 6, 36), "mask": (2, 5, 6, 18)} | change
    with pytest.raises(ValueError, match=message):
        dcnv3(*(torch.zeros(shape) for shape in shapes.values()), *PLAIN)


def test_remove_center_needs_a_center():
    with pytest.raises(ValueError, match="remove_center=True"):
        dcnv3(
            torch.zeros(1, 4, 4, 1),
            torch.zeros(1, 3, 3, 6),
            torch.zeros(1, 3, 3, 3),
            (2, 2),
            (1, 1),
            (0, 0),
            (1, 1),
            1,
            1.0,
            True,
        )
    with pytest.raises(ValueError, match=r"remove_center=True .*1 x 1"):
        dcnv3(
            torch.zeros(1, 4, 4, 1),
            torch.zeros(1, 4, 4, 0),
            torch.zeros(1, 4, 4, 0),
            (1, 1),
            (1, 1),
            (0, 0),
            (1, 1),
            1,
            1.0,
            True,
        )
