"""Multi-scale deformable attention out of PyTorch's `grid_sample`, for any device: forward, and the backward pass written out.

In and out: see `deformable_attention_operator`. Memory beside inputs and results is bounded: queries are taken some at a time, and the backward pass samples
anew. On GPUs the gradient of the value is added up in no certain order; torch says so where deterministic algorithms are asked for.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.models.sampling_operators import compute_dtype

SAMPLED_AT_ONCE = 2**26
"""Values that are sampled at a time: 256 MiB in fp32."""
BILINEAR, ZEROS = 0, 0  # torch's numbers for these ways of sampling


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    batch, _, heads, channels = value.shape
    maps, out = (
        _maps(value, shapes, compute_dtype(value, locations, weights)),
        value.new_empty(batch, weights.size(1), heads * channels),
    )
    for part in _chunks(value, weights):
        grids, shares = _grids(locations[:, part], maps[0].dtype), _shares(weights[:, part], maps[0].dtype)
        total: Tensor | float = 0.0
        for level, pixels in enumerate(maps):
            total = total + (_sampled(pixels, grids[:, :, level]) * shares[:, :, :, level]).sum(
                -1
            )  # (b heads, c, n, points) -> (b heads, c, n)
        out[:, part] = total.view(batch, heads * channels, shares.size(2)).transpose(1, 2)
    return out


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (b, n, heads * c), of the result -> the gradients of value, locations and weights, each in its shape and dtype."""
    batch, _, heads, channels = value.shape
    maps = _maps(value, shapes, compute_dtype(value, locations, weights))
    of_maps = [torch.zeros_like(pixels) for pixels in maps]
    of_locations, of_weights = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (locations, weights)
    )
    for part in _chunks(value, weights):
        grids, shares = _grids(locations[:, part], maps[0].dtype), _shares(weights[:, part], maps[0].dtype)
        of_total = (
            grad[:, part]
            .to(maps[0].dtype)
            .transpose(1, 2)
            .reshape(batch * heads, channels, shares.size(2), 1)
        )
        for level, pixels in enumerate(maps):
            of_shares = (_sampled(pixels, grids[:, :, level]) * of_total).sum(1)  # (b heads, n, points)
            of_weights[:, part, :, level] = of_shares.unflatten(0, (batch, heads)).transpose(1, 2)
            of_pixels, of_grid = torch.ops.aten.grid_sampler_2d_backward(
                of_total * shares[:, :, :, level],
                pixels,
                grids[:, :, level],
                BILINEAR,
                ZEROS,
                False,
                [True, True],
            )
            of_maps[level] += of_pixels
            of_locations[:, part, :, level] = 2 * of_grid.unflatten(0, (batch, heads)).transpose(1, 2)
    of_value = (
        torch.cat([pixels.flatten(2) for pixels in of_maps], dim=2)
        .unflatten(0, (batch, heads))
        .permute(0, 3, 1, 2)
    )  # (b, n, heads, c)
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format).copy_(of_value),
        of_locations,
        of_weights,
    )


def _chunks(value: Tensor, weights: Tensor) -> Iterator[slice]:
    """Slices of the queries."""
    some = max(1, SAMPLED_AT_ONCE // max(1, value.size(0) * value.size(2) * value.size(3) * weights.size(-1)))
    return (slice(begin, begin + some) for begin in range(0, weights.size(1), some))


def _maps(value: Tensor, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """(b, n, heads, c) -> (b heads, c, h, w) of each map."""
    parts = (
        value.to(dtype)
        .permute(0, 2, 3, 1)
        .flatten(0, 1)
        .split([height * width for height, width in shapes], dim=2)
    )
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def _grids(locations: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, n, heads, levels, points, 2) -> (b heads, n, levels, points, 2), in [-1, 1]."""
    return (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)


def _shares(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, n, heads, levels, points) -> (b heads, 1, n, levels, points)."""
    return weights.to(dtype).transpose(1, 2).flatten(0, 1)[:, None]


def _sampled(pixels: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
