"""The DCNv3 operator out of PyTorch's own operations, for any device: forward, and the backward pass written out.

In and out: see `dcnv3_operator`. Memory beside inputs and results is bounded: output positions are taken in chunks, and the backward pass computes each anew.

A bilinear sample is a weighted sum of four rows of a table that holds, for each position of the zero-padded input and each group, its channels. The four lie at
fixed distances, so one index per point serves the table and three views of it that begin later; the sums over points are those of `F.embedding_bag`. The
gradient of the table is such a sum too, over the points sorted by their index: no scattered additions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.models.dcnv3_geometry import Geometry

POINTS_PER_CHUNK = 1 << 16
"""Sampling points (output positions x groups x points of the kernel) that are computed at once."""


class _Points(NamedTuple):
    """The sampling points of p output positions; each field (p, group, k)."""

    index: Tensor
    """Row of the padded table that holds the corner above and to the left of the location."""
    down: Tensor
    """Distance of the location from that corner, 0 to 1; NaN where the location is."""
    right: Tensor
    inside_y: Tensor
    """Whether the offset moves the location vertically: not where it lies a whole pixel or more outside the input, where all is zero."""
    inside_x: Tensor


def forward(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, chunk: int = POINTS_PER_CHUNK) -> Tensor:
    """x (n, h, w, c), offset (n, h', w', g k 2), mask (n, h', w', g k) -> (n, h', w', c), in the dtype of x. chunk: points at once."""
    compute, group, k = compute_dtype(x, offset, mask), geometry.group, geometry.points
    table, offset, mask = _table(x, group, compute), offset.reshape(-1, group, k, 2), mask.reshape(-1, group, k)
    out = x.new_empty(len(mask), x.size(3))
    for part in _chunks(len(mask), group * k, chunk):
        points = _points(x, offset[part], part.start, geometry, compute)
        bags, total = points.index.view(-1, k), None
        for rows, weight in zip(_corners(table, x, group), _weights(points, mask[part].to(compute))):
            corner = F.embedding_bag(bags, rows, mode="sum", per_sample_weights=weight.view(-1, k))
            total = corner if total is None else total.add_(corner)
        out[part] = total.view(-1, x.size(3))
    return out.view(x.size(0), *geometry.out_size(x.size(1), x.size(2)), x.size(3))


def backward(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, chunk: int = POINTS_PER_CHUNK) -> tuple[Tensor, Tensor, Tensor]:
    """grad (n, h', w', c), of the result -> the gradients of x, offset and mask, each in its shape and dtype."""
    compute, group, k = compute_dtype(x, offset, mask), geometry.group, geometry.points
    n, height, width, channels = x.shape
    table = _table(x, group, compute)
    grad_table = torch.zeros_like(table)
    grad_offset, grad_mask = torch.empty_like(offset, memory_format=torch.contiguous_format), torch.empty_like(mask, memory_format=torch.contiguous_format)
    offsets, masks, grads = offset.reshape(-1, group, k, 2), mask.reshape(-1, group, k), grad.reshape(-1, group, channels // group)
    for part in _chunks(len(masks), group * k, chunk):
        points, m = _points(x, offsets[part], part.start, geometry, compute), masks[part].to(compute)
        of_bags = grads[part].to(compute).reshape(-1, channels // group)  # (p g, c / g)
        above_left, above_right, below_left, below_right = (_products(of_bags, rows, points.index) for rows in _corners(table, x, group))
        above, below = torch.lerp(above_left, above_right, points.right), torch.lerp(below_left, below_right, points.right)
        left, right = torch.lerp(above_left, below_left, points.down), torch.lerp(above_right, below_right, points.down)
        grad_mask.view(-1, group, k)[part] = torch.lerp(above, below, points.down)
        m_scaled = m * geometry.offset_scale
        grad_offset.view(-1, group, k, 2)[part] = torch.stack([(right - left) * m_scaled * points.inside_x, (below - above) * m_scaled * points.inside_y], dim=-1)

        index, order = points.index.view(-1).sort()
        first, last = int(index[0]), int(index[-1])
        ends = torch.bincount(index - first, minlength=last - first + 1).cumsum(0)
        begins = F.pad(ends[:-1], (1, 0)).to(index.dtype)
        bag = (order // k).to(index.dtype)
        for rows, weight in zip(_corners(grad_table, x, group), _weights(points, m)):
            rows[first:last + 1] += F.embedding_bag(bag, of_bags, begins, mode="sum", per_sample_weights=weight.view(-1)[order])
    grad_x = grad_table.view(n, height + 2, width + 2, channels)[:, 1:-1, 1:-1].to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_x, grad_offset, grad_mask


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where one of the tensors is, else fp32: never less, since a location that bf16 rounds is another location."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _chunks(positions: int, points: int, chunk: int) -> Iterator[slice]:
    """Slices of the output positions, of `points` points each, that hold about `chunk` points."""
    step = max(1, chunk // points)
    return (slice(begin, min(begin + step, positions)) for begin in range(0, positions, step))


def _table(x: Tensor, group: int, compute: torch.dtype) -> Tensor:
    """x (n, h, w, c), zero-padded by one pixel, as (n (h + 2) (w + 2) g, c / g)."""
    return F.pad(x.to(compute), (0, 0, 1, 1, 1, 1)).view(-1, x.size(3) // group)


def _corners(table: Tensor, x: Tensor, group: int) -> list[Tensor]:
    """Views of the table in which the index of a corner above and to the left finds the corners above (left, right) and below (left, right)."""
    down = group * (x.size(2) + 2)
    return [table[distance:] for distance in (0, group, down, down + group)]


def _points(x: Tensor, offset: Tensor, begin: int, geometry: Geometry, compute: torch.dtype) -> _Points:
    """offset (p, g, k, 2) of the output positions from the number `begin` on -> their sampling points."""
    _, height, width, _ = x.shape
    out_height, out_width = geometry.out_size(height, width)
    position = torch.arange(begin, begin + len(offset), device=x.device)
    p_k = torch.tensor(geometry.p_k, dtype=compute, device=x.device) * geometry.offset_scale
    place = position % (out_height * out_width)
    row, column = place // out_width, place % out_width
    axes = []
    for axis, (along, side) in enumerate(((row, height), (column, width))):
        p0 = (geometry.first[axis] + along * geometry.stride[axis]).to(compute)
        where = torch.addcmul((p0[:, None] + p_k[:, axis]).unsqueeze(1), offset[..., 1 - axis].to(compute), offset.new_tensor(geometry.offset_scale, dtype=compute))
        inside = (where > -1) & (where < side)
        where = where.clamp_(-1, side)
        corner = where.floor().to(torch.int32).clamp_(-1, side - 1)  # after the conversion once more: NaN becomes some number, which is to be an index
        axes.append((corner, where.sub_(corner), inside))
    (top, down, inside_y), (left, right, inside_x) = axes
    groups = torch.arange(geometry.group, device=x.device).view(1, -1, 1)
    image = position // (out_height * out_width)
    base = ((image * (height + 2) + 1) * (width + 2) + 1)[:, None, None] * geometry.group + groups  # of the corner (0, 0)
    rows = x.size(0) * (height + 2) * (width + 2) * geometry.group
    base = base.to(torch.int32 if rows < 2**31 else torch.int64)
    return _Points((top * (width + 2) + left) * geometry.group + base, down, right, inside_y, inside_x)


def _weights(points: _Points, mask: Tensor) -> Iterator[Tensor]:
    """How much of each corner a point takes: above (left, right) and below (left, right), (p, g, k) each."""
    below = mask * points.down
    for vertical in (mask - below, below):
        right = vertical * points.right
        yield vertical - right
        yield right


def _products(grad: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """The scalar product of each point's row with the gradient of its bag. grad (p g, c / g), index (p, g, k) -> (p, g, k)."""
    k, flat = index.size(-1), index.view(-1)
    begins = torch.arange(0, len(flat), k, dtype=flat.dtype, device=flat.device)
    bag = torch.arange(len(grad), dtype=flat.dtype, device=flat.device).repeat_interleave(k)
    # what autograd calls for the weights of an embedding_bag whose rows need no gradient
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, rows, flat, begins, bag, 0, -1).view_as(index)
