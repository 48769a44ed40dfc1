"""The core of multi-scale deformable attention as one operation of torch,
`internseg_ds::deformable_attention`: sampling and the weighted sum over points.

    y_h(q) = sum over levels l and points p of A_hqlp * x_hl(location_hqlp)

For the backward pass it keeps its inputs only. Locations and sums are fp32 (fp64 for fp64 inputs) whatever
the dtypes of the tensors, also under autocast. On GPUs Triton kernels run; elsewhere, and where deterministic
algorithms are asked for, PyTorch's `grid_sample`. Letters: b images, n queries, N tokens of all maps (the sum
of their h w), c channels of a head. Source: Zhu et al., "Deformable DETR", 2021, equation 3.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from internseg_ds.models.sampling import deformable_attention_torch
from internseg_ds.models.sampling.implementations import implementation_for

TRITON_KERNELS = "internseg_ds.models.sampling.deformable_attention_triton"
"""Imported at its first use: importing it imports Triton, which only builds of torch for GPUs bring."""


def implementation(value: Tensor, locations: Tensor, weights: Tensor) -> ModuleType:
    """Choose what computes these tensors (shapes as of `deformable_attention`):
    `deformable_attention_triton` on GPUs where Triton can be imported, else `deformable_attention_torch`,
    also for fp64 and under `torch.use_deterministic_algorithms` (launch/train.py --deterministic), where
    torch warns that grid_sample's gradient on a GPU is not deterministic."""
    return implementation_for((value, locations, weights), TRITON_KERNELS, deformable_attention_torch)


@torch.library.custom_op("internseg_ds::deformable_attention", mutates_args=())
def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]) -> Tensor:
    """Sample the maps in `value` at the locations, and sum over maps and points.

    value: (b, N, heads, c), locations: (b, n, heads, levels, points, 2), weights: (b, n, heads, levels,
    points), any float dtypes. Returns (b, n, heads * c) in the dtype of the value.

    sides: height and width of the first map, of the second, ...; tokens are their pixels, row by row, one map
    after the other. A location is (horizontal, vertical), 0 to 1 from edge to edge of a map. Outside lie
    zeros; samples are bilinear. Raises ValueError where shapes do not match.
    """
    shapes = _shapes(value, locations, weights, sides)
    return implementation(value, locations, weights).forward(value, locations, weights, shapes)


@torch.library.custom_op("internseg_ds::deformable_attention_backward", mutates_args=())
def deformable_attention_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (b, n, heads * c), of the result of `deformable_attention`, whose arguments follow. Returns
    the gradients of value, locations and weights, each in its shape and dtype."""
    shapes = _shapes(value, locations, weights, sides)
    return implementation(value, locations, weights).backward(grad, value, locations, weights, shapes)


@deformable_attention.register_fake
def _(value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]) -> Tensor:
    _shapes(value, locations, weights, sides)
    return value.new_empty(*weights.shape[:2], value.size(2) * value.size(3))


@deformable_attention_backward.register_fake
def _(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(value), _empty_like(locations), _empty_like(weights)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """ctx: torch's FunctionCtx. inputs: the arguments of `deformable_attention`."""
    *tensors, ctx.sides = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad: (b, n, heads * c). Returns one gradient for each argument of `deformable_attention`, None for
    the sides."""
    return (*deformable_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.sides), None)


deformable_attention.register_autograd(_gradients, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.internseg_ds.deformable_attention)
def forward_flops(
    value: torch.Size, locations: torch.Size, weights: torch.Size, sides: Sequence[int], **_: Any
) -> int:
    """FLOPs of `deformable_attention` for tensors of these shapes: a multiplication and an addition for
    each channel of the four corners of each point. What is done once per point is not counted."""
    return 8 * math.prod(weights) * value[3]


@register_flop_formula(torch.ops.internseg_ds.deformable_attention_backward)
def backward_flops(
    grad: torch.Size,
    value: torch.Size,
    locations: torch.Size,
    weights: torch.Size,
    sides: Sequence[int],
    **_: Any,
) -> int:
    """FLOPs of `deformable_attention_backward`: as many as forward for the gradient of the value, and as
    many for the four products from which those of weights and locations are made."""
    return 2 * forward_flops(value, locations, weights, sides)


def _shapes(value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each map.

    Raises ValueError where the tensors' shapes do not match these or each other: kernels read memory without
    checking bounds.
    """
    shapes = list(zip(sides[::2], sides[1::2], strict=True))
    pixels = sum(height * width for height, width in shapes)
    if value.dim() != 4 or value.size(1) != pixels:
        raise ValueError(
            f"the value of deformable attention has the shape {tuple(value.shape)}; for maps of {shapes} "
            f"it must be (b, {pixels}, heads, c)"
        )
    batch, heads = value.size(0), value.size(2)
    if weights.dim() != 5 or (weights.size(0), *weights.shape[2:4]) != (batch, heads, len(shapes)):
        raise ValueError(
            f"the weights of deformable attention have the shape {tuple(weights.shape)}; for a value of "
            f"{tuple(value.shape)} and {len(shapes)} maps it must be "
            f"({batch}, queries, {heads}, {len(shapes)}, points)"
        )
    if tuple(locations.shape) != (*weights.shape, 2):
        raise ValueError(
            f"the locations of deformable attention have the shape {tuple(locations.shape)}; for these "
            f"weights it must be {(*weights.shape, 2)}"
        )
    return shapes
