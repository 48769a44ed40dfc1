"""DCNv3's core as one operation of torch, `internseg_ds::dcnv3`: deformable sampling and the weighted sum
over points, without the projections around it.

    y_g(p0) = sum over k of m_gk * x_g(p0 + (p_k + offset_gk) * offset_scale)

In: channels-last features, offsets and masks, which the softmax has been taken of. Out: channels-last
features. For the backward pass it keeps its inputs only. Locations, masks and sums are fp32 (fp64 for fp64
inputs) whatever the dtypes of the tensors. On GPUs Triton kernels run; elsewhere, and where deterministic
algorithms are asked for, PyTorch's operations. Letters: n images, (h, w) the input's size, (h', w') the
output's, c channels, g groups, k points of a group. Source: Wang et al., "InternImage" (CVPR 2023), equation
2.

Why a custom operation: activation checkpointing keeps its result by name (`KEPT`), planning counts its FLOPs
and runs it on tensors without values, and autograd keeps none of its intermediate tensors.

Why ten arguments: torch derives the operation's schema from the signature, and a schema takes tensors,
numbers and lists of numbers only.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from internseg_ds.models.intern_image import dcnv3_torch
from internseg_ds.models.intern_image.dcnv3_geometry import geometry
from internseg_ds.models.sampling.implementations import implementation_for

TRITON_KERNELS = "internseg_ds.models.intern_image.dcnv3_triton"
"""Imported at its first use: importing it imports Triton, which only builds of torch for GPUs bring."""


def implementation(x: Tensor, offset: Tensor, mask: Tensor) -> ModuleType:
    """Choose what computes these tensors (shapes as of `dcnv3`): `dcnv3_triton` on GPUs where Triton can
    be imported, else `dcnv3_torch`, also for fp64 and under `torch.use_deterministic_algorithms`
    (launch/train.py --deterministic)."""
    return implementation_for((x, offset, mask), TRITON_KERNELS, dcnv3_torch)


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
    """Sample x at the points' locations and sum over the points of each group.

    x: (n, h, w, c), offset: (n, h', w', g * k * 2), mask: (n, h', w', g * k), any float dtypes. Returns (n,
    h', w', c) in the dtype of x. kernel, stride, pad, dilation: (vertical, horizontal).

    The k points of the kernel are ordered column by column, each from top to bottom, without the middle one
    where remove_center; an offset is (horizontal, vertical), in pixels before offset_scale. Outside the input
    lie zeros; samples are bilinear. An offset that is not finite makes the result NaN, so that the training
    step is skipped. Raises ValueError where shapes do not match.
    """
    settings = (kernel, stride, pad, dilation, group, offset_scale, remove_center)
    made = geometry(x, offset, mask, settings)
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
    """grad: (n, h', w', c), of the result of `dcnv3`, whose arguments follow. Returns the gradients of x,
    offset and mask, each in its shape and dtype."""
    settings = (kernel, stride, pad, dilation, group, offset_scale, remove_center)
    made = geometry(x, offset, mask, settings)
    return implementation(x, offset, mask).backward(grad, x, offset, mask, made)


@dcnv3.register_fake
def _(x: Tensor, offset: Tensor, mask: Tensor, *settings: Any) -> Tensor:
    geometry(x, offset, mask, settings)
    return x.new_empty(*mask.shape[:3], x.size(3))


@dcnv3_backward.register_fake
def _(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(x), _empty_like(offset), _empty_like(mask)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """ctx: torch's FunctionCtx. inputs: the arguments of `dcnv3`."""
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad: (n, h', w', c). Returns one gradient for each argument of `dcnv3`, None for the settings."""
    of_tensors = dcnv3_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *of_tensors, *[None] * len(ctx.settings)


dcnv3.register_autograd(_gradients, setup_context=_keep_inputs)

GROUP = 4
"""Position of `group` among the settings, which are the arguments behind the tensors."""


@register_flop_formula(torch.ops.internseg_ds.dcnv3)
def forward_flops(x: torch.Size, offset: torch.Size, mask: torch.Size, *settings: Any, **_: Any) -> int:
    """FLOPs of `dcnv3` for tensors of these shapes: a multiplication and an addition for each channel of
    the four corners of each point. What is done once per point is not counted."""
    return 8 * math.prod(mask) * x[3] // int(settings[GROUP])


@register_flop_formula(torch.ops.internseg_ds.dcnv3_backward)
def backward_flops(
    grad: torch.Size, x: torch.Size, offset: torch.Size, mask: torch.Size, *settings: Any, **_: Any
) -> int:
    """FLOPs of `dcnv3_backward`: as many as forward for the gradient of the input, and as many for the
    four products from which those of mask and offset are made."""
    return 2 * forward_flops(x, offset, mask, *settings)
