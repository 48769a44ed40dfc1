"""Deformable attention as a loop over samples and neighbours, written from equation 3 of Deformable DETR;
autograd differentiates it. Slow, exact in fp64."""

import torch
from torch import Tensor


def attention_by_loops(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """As `attend`. Locations that are not finite count as outside."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = [torch.zeros(value.size(-1), dtype=value.dtype)] * (batch * queries * heads)
    for b, q, head, level, point in torch.cartesian_prod(
        *map(torch.arange, (batch, queries, heads, levels, points))
    ).tolist():
        height, width = shapes[level]
        start = sum(h * w for h, w in shapes[:level])
        column, row = (
            locations[b, q, head, level, point, axis] * size - 0.5 for axis, size in ((0, width), (1, height))
        )
        if not (-1 < row < height and -1 < column < width):
            continue
        for i in (int(row.floor()), int(row.floor()) + 1):
            for j in (int(column.floor()), int(column.floor()) + 1):
                if 0 <= i < height and 0 <= j < width:
                    near = (1 - (row - i).abs()) * (1 - (column - j).abs())
                    at = (b * queries + q) * heads + head
                    out[at] = (
                        out[at]
                        + weights[b, q, head, level, point] * near * value[b, start + i * width + j, head]
                    )
    return torch.stack(out).view(batch, queries, heads * value.size(-1))


def with_gradients(
    attend, value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """The result of `attend` and the gradients of value, locations and weights."""
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    out = attend(leaves[0], shapes, *leaves[1:])
    return out.detach(), *torch.autograd.grad(out, leaves, grad)
