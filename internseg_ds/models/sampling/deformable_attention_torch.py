"""Multi-scale deformable attention out of PyTorch's `grid_sample`, for any device: forward, and the backward
pass written out.

In and out: see `deformable_attention_operator`. Memory beside inputs and results is bounded: queries are
taken some at a time, and the backward pass samples anew. On GPUs the gradient of the value is added up in no
fixed order; torch warns of this where deterministic algorithms are asked for. Letters: b images, n queries
(of all, or of a chunk), c channels of a head. Computation is in fp32, or in fp64 where a tensor is fp64:
"compute dtype".
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.models.sampling.implementations import compute_dtype

SAMPLED_AT_ONCE = 2**26
"""Number of values that are sampled at a time: 256 MiB in fp32."""
BILINEAR, ZEROS = 0, 0
"""torch's numbers of these modes of interpolation and of padding."""


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Shapes and dtypes as of the operator. shapes: (h, w) of each map."""
    batch, _, heads, channels = value.shape
    compute = compute_dtype(value, locations, weights)
    maps = _maps(value, shapes, compute)
    out = value.new_empty(batch, weights.size(1), heads * channels)
    for part in _chunks(value, weights):
        out[:, part] = _attended(maps, locations[:, part], weights[:, part], heads)
    return out


def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int]) -> Tensor:
    """The operator, of all queries at once and without a loop over them: what an exported program has in its
    place."""
    maps = _maps(
        value, list(zip(sides[::2], sides[1::2], strict=True)), compute_dtype(value, locations, weights)
    )
    return _attended(maps, locations, weights, value.size(2)).to(value.dtype)


def _attended(maps: Sequence[Tensor], locations: Tensor, weights: Tensor, heads: int) -> Tensor:
    """maps: (b heads, c, h, w) each, in the compute dtype; locations: (b, n, heads, levels, points, 2), weights:
    (b, n, heads, levels, points). Returns (b, n, heads * c) in the compute dtype."""
    grids = _grids(locations, maps[0].dtype)
    shares = _shares(weights, maps[0].dtype)
    total: Tensor | None = None
    for level, pixels in enumerate(maps):
        # (b heads, c, n, points) -> (b heads, c, n)
        sums = (_sampled(pixels, grids[:, :, level]) * shares[:, :, :, level]).sum(-1)
        total = sums if total is None else total + sums
    if total is None:
        raise ValueError("deformable attention has no maps")
    return total.unflatten(0, (-1, heads)).flatten(1, 2).mT


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (b, n, heads * c), of the result. Returns the gradients of value, locations and weights, each
    in its shape and dtype."""
    batch, _, heads, channels = value.shape
    compute = compute_dtype(value, locations, weights)
    maps = _maps(value, shapes, compute)
    grad_maps = [torch.zeros_like(pixels) for pixels in maps]
    grad_locations = torch.empty_like(locations, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    for part in _chunks(value, weights):
        grids = _grids(locations[:, part], compute)
        shares = _shares(weights[:, part], compute)
        grad_out = grad[:, part].to(compute).transpose(1, 2)
        grad_out = grad_out.reshape(batch * heads, channels, shares.size(2), 1)
        for level, pixels in enumerate(maps):
            grid = grids[:, :, level]
            of_shares = (_sampled(pixels, grid) * grad_out).sum(1)  # (b heads, n, points)
            grad_weights[:, part, :, level] = of_shares.unflatten(0, (batch, heads)).transpose(1, 2)
            of_pixels, of_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad_out * shares[:, :, :, level], pixels, grid, BILINEAR, ZEROS, False, [True, True]
            )
            grad_maps[level] += of_pixels
            # a grid is 2 * location - 1
            grad_locations[:, part, :, level] = 2 * of_grid.unflatten(0, (batch, heads)).transpose(1, 2)
    # (b heads, c, N) -> (b, N, heads, c)
    grad_value = (
        torch.cat([pixels.flatten(2) for pixels in grad_maps], dim=2)
        .unflatten(0, (batch, heads))
        .permute(0, 3, 1, 2)
    )
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format).copy_(grad_value),
        grad_locations,
        grad_weights,
    )


def _chunks(value: Tensor, weights: Tensor) -> Iterator[slice]:
    """value: (b, N, heads, c), weights: (b, n, heads, levels, points), for their shapes. Slices of the n
    queries, each of which samples at most SAMPLED_AT_ONCE values of a map."""
    per_query = value.size(0) * value.size(2) * value.size(3) * weights.size(-1)
    some = max(1, SAMPLED_AT_ONCE // max(1, per_query))
    return (slice(begin, begin + some) for begin in range(0, weights.size(1), some))


def _maps(value: Tensor, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """value: (b, N, heads, c) -> (b heads, c, h, w) of each map, in `dtype`."""
    parts = (
        value.to(dtype)
        .permute(0, 2, 3, 1)
        .flatten(0, 1)
        .split([height * width for height, width in shapes], dim=2)
    )
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def _grids(locations: Tensor, dtype: torch.dtype) -> Tensor:
    """locations: (b, n, heads, levels, points, 2) in [0, 1] -> (b heads, n, levels, points, 2) in [-1, 1],
    which grid_sample takes, in `dtype`."""
    return (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)


def _shares(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """weights: (b, n, heads, levels, points) -> (b heads, 1, n, levels, points) in `dtype`."""
    return weights.to(dtype).transpose(1, 2).flatten(0, 1)[:, None]


def _sampled(pixels: Tensor, grid: Tensor) -> Tensor:
    """pixels: (b heads, c, h, w), grid: (b heads, n, points, 2), of one dtype -> (b heads, c, n, points)."""
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
