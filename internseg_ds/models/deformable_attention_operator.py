"""The core of multi-scale deformable attention as one operation of torch, `internseg_ds::deformable_attention`: sampling and the weighted sum over points.

    y_h(q) = sum over levels l and points p of A_hqlp * x_hl(location_hqlp)

It keeps its inputs only for the backward pass. Locations and sums are fp32 (fp64 for fp64 inputs) whatever the dtypes of the tensors, also under autocast.
On GPUs Triton kernels run, elsewhere and where deterministic algorithms are asked for PyTorch's `grid_sample`.
Source: Zhu et al., "Deformable DETR", 2021, equation 3.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from internseg_ds.models import deformable_attention_torch
from internseg_ds.models.sampling_operators import implementation_for


def implementation(value: Tensor, locations: Tensor, weights: Tensor) -> ModuleType:
    """What computes these tensors: `deformable_attention_triton` on GPUs where Triton can be imported, or `deformable_attention_torch`, also for fp64 and
    under `torch.use_deterministic_algorithms` (launch/train.py --deterministic), where torch warns that its gradient of the value is not."""
    return implementation_for(
        (value, locations, weights), "deformable_attention_triton", deformable_attention_torch
    )


@torch.library.custom_op("internseg_ds::deformable_attention", mutates_args=())
def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]) -> Tensor:
    """value (b, tokens, heads, c), locations (b, n, heads, levels, points, 2), weights (b, n, heads, levels, points) -> (b, n, heads * c), as value's dtype.

    sides: height and width of the first map, of the second, ...; tokens are their pixels, row by row, one map after the other. A location is (horizontal,
    vertical), 0 to 1 from edge to edge of a map. Outside lie zeros; samples are bilinear. Raises ValueError where shapes do not fit.
    """
    shapes = _shapes(value, locations, weights, sides)
    return implementation(value, locations, weights).forward(value, locations, weights, shapes)


@torch.library.custom_op("internseg_ds::deformable_attention_backward", mutates_args=())
def deformable_attention_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (b, n, heads * c), of the result of `deformable_attention` -> the gradients of value, locations and weights."""
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
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (value, locations, weights)
    )


def _keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.sides = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*deformable_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.sides), None)


deformable_attention.register_autograd(_gradients, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.internseg_ds.deformable_attention)
def forward_flops(
    value: torch.Size,
    locations: torch.Size,
    weights: torch.Size,
    sides: Sequence[int],
    out_shape: object = None,
    **_: object,
) -> int:
    """A multiplication and an addition for each channel of the four corners of each point; what is done once per point is not counted."""
    return 8 * math.prod(weights) * value[3]


@register_flop_formula(torch.ops.internseg_ds.deformable_attention_backward)
def backward_flops(
    grad: torch.Size,
    value: torch.Size,
    locations: torch.Size,
    weights: torch.Size,
    sides: Sequence[int],
    out_shape: object = None,
    **_: object,
) -> int:
    """As many for the gradient of the value, and for the four products from which those of weights and locations are made."""
    return 2 * forward_flops(value, locations, weights, sides)


def _shapes(value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each map. Raises ValueError where the tensors do not fit these or each other: kernels read what they are told to."""
    shapes = list(zip(sides[::2], sides[1::2], strict=True))
    pixels = sum(height * width for height, width in shapes)
    if value.dim() != 4 or value.size(1) != pixels:
        raise ValueError(
            f"the value of deformable attention has the shape {tuple(value.shape)}; for maps of {shapes} it must be (b, {pixels}, heads, c)"
        )
    wanted = (value.size(0), value.size(2), len(shapes))
    if weights.dim() != 5 or (weights.size(0), *weights.shape[2:4]) != wanted:
        raise ValueError(
            f"the weights of deformable attention have the shape {tuple(weights.shape)}; for a value of {tuple(value.shape)} and "
            f"{len(shapes)} maps it must be ({wanted[0]}, queries, {wanted[1]}, {wanted[2]}, points)"
        )
    if tuple(locations.shape) != (*weights.shape, 2):
        raise ValueError(
            f"the locations of deformable attention have the shape {tuple(locations.shape)}; for these weights it must be {(*weights.shape, 2)}"
        )
    return shapes
