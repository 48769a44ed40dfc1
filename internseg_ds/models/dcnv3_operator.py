"""DCNv3's core as one operation of torch, `internseg_ds::dcnv3`: deformable sampling and the weighted sum over points, without the projections around it.

    y_g(p0) = sum over k of m_gk * x_g(p0 + (p_k + offset_gk) * offset_scale)

In: channels-last features, offsets and masks, which the softmax has been taken of. Out: channels-last features. For the backward pass it keeps its inputs only.
Locations, masks and sums are fp32 (fp64 for fp64 inputs) whatever the dtypes of the tensors. On GPUs Triton kernels run, elsewhere and
where deterministic algorithms are asked for PyTorch's operations.
Source: Wang et al., "InternImage" (CVPR 2023), equation 2.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from internseg_ds.models import dcnv3_torch
from internseg_ds.models.dcnv3_geometry import geometry
from internseg_ds.models.sampling_operators import implementation_for


def implementation(x: Tensor, offset: Tensor, mask: Tensor) -> ModuleType:
    """What computes these tensors: `dcnv3_triton` on GPUs where Triton can be imported, or `dcnv3_torch`, also for fp64 and under
    `torch.use_deterministic_algorithms` (launch/train.py --deterministic), since Triton's backward pass adds in no certain order."""
    return implementation_for((x, offset, mask), "dcnv3_triton", dcnv3_torch)


@torch.library.custom_op("internseg_ds::dcnv3", mutates_args=())
def dcnv3(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    group: int,
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    """x (n, h, w, c), offset (n, h', w', group * k * 2), mask (n, h', w', group * k) -> (n, h', w', c) in the dtype of x.

    kernel, stride, pad, dilation: (vertical, horizontal). k: points of the kernel, columns from left to right and each from top to bottom, without the middle
    one where remove_center; an offset is (horizontal, vertical), in pixels before offset_scale. Outside the input lie zeros; samples are bilinear. An offset
    that is not finite makes a result that is NaN, so that the step is skipped. Raises ValueError where shapes do not fit.
    """
    made = geometry(x, offset, mask, kernel, stride, pad, dilation, group, offset_scale, remove_center)
    return implementation(x, offset, mask).forward(x, offset, mask, made)


@torch.library.custom_op("internseg_ds::dcnv3_backward", mutates_args=())
def dcnv3_backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    group: int,
    offset_scale: float,
    remove_center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (n, h', w', c), of the result of `dcnv3` -> the gradients of x, offset and mask."""
    made = geometry(x, offset, mask, kernel, stride, pad, dilation, group, offset_scale, remove_center)
    return implementation(x, offset, mask).backward(grad, x, offset, mask, made)


@dcnv3.register_fake
def _(x: Tensor, offset: Tensor, mask: Tensor, *arguments: object) -> Tensor:
    geometry(x, offset, mask, *arguments)
    return x.new_empty(*mask.shape[:3], x.size(3))


@dcnv3_backward.register_fake
def _(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, offset, mask)
    )


def _keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (
        *dcnv3_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.arguments),
        *[None] * len(ctx.arguments),
    )


dcnv3.register_autograd(_gradients, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.internseg_ds.dcnv3)
def forward_flops(
    x: torch.Size,
    offset: torch.Size,
    mask: torch.Size,
    *arguments: object,
    out_shape: torch.Size | None = None,
    **_: object,
) -> int:
    """A multiplication and an addition for each channel of the four corners of each point; what is done once per point is not counted."""
    group = arguments[4]
    return 8 * math.prod(mask) * x[3] // group


@register_flop_formula(torch.ops.internseg_ds.dcnv3_backward)
def backward_flops(
    grad: torch.Size,
    x: torch.Size,
    offset: torch.Size,
    mask: torch.Size,
    *arguments: object,
    out_shape: object = None,
    **_: object,
) -> int:
    """As many for the gradient of the input, and for the four products from which those of mask and offset are made."""
    return 2 * forward_flops(x, offset, mask, *arguments)
