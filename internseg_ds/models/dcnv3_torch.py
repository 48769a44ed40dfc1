"""The DCNv3 operator out of PyTorch's own operations, for any device: forward, and the backward pass written out.

In and out: see `dcnv3_operator`. Memory beside inputs and results is bounded: output positions are taken in chunks, and the backward pass computes each anew.

A bilinear sample is a weighted sum of four rows of a table that holds, for each position of the zero-padded input and each group, its channels. The four lie at
fixed distances, so one index per point serves the table and three views of it that begin later; the sums over points are those of `F.embedding_bag`. The
gradient of the table is such a sum too, over the points sorted by their index: no scattered additions. It is what runs where deterministic algorithms are asked
for; whether embedding_bag and sampled_addmm give the same bits in each run on a GPU was not checked.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.models.dcnv3_geometry import Geometry
from internseg_ds.models.sampling_operators import compute_dtype

POINTS_PER_CHUNK = 1 << 16
"""Sampling points (output positions x groups x points of the kernel) that are computed at once: what is made of them stays in a CPU's cache."""
BORDER = 2
"""Zeros around the input: so wide that a location a pixel or more outside has only zeros around it, and gets no gradient."""


class _Points(NamedTuple):
    """The sampling points of p output positions; each field (p, group, k)."""

    index: Tensor
    """Row of the table that holds the corner above and to the left of the location."""
    down: Tensor
    """Distance of the location from that corner, 0 to 1, anything from -1 to 1 a pixel or more outside; NaN where the location is not finite."""
    right: Tensor


def forward(
    x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, chunk: int = POINTS_PER_CHUNK
) -> Tensor:
    """x (n, h, w, c), offset (n, h', w', g k 2), mask (n, h', w', g k) -> (n, h', w', c), in the dtype of x. chunk: points at once."""
    compute, group, k = compute_dtype(x, offset, mask), geometry.group, geometry.points
    table, offset, mask = (
        _table(x, group, compute),
        offset.reshape(-1, group, k, 2),
        mask.reshape(-1, group, k),
    )
    out = x.new_empty(len(mask), x.size(3))
    for part in _chunks(len(mask), group * k, chunk):
        points = _points(x, offset[part], part.start, geometry, compute)
        bags, total = points.index.view(-1, k), None
        for rows, weight in zip(_corners(table, x, group), _weights(points, mask[part].to(compute))):
            corner = F.embedding_bag(bags, rows, mode="sum", per_sample_weights=weight.view(-1, k))
            total = corner if total is None else total.add_(corner)
        out[part] = total.view(-1, x.size(3))
    return out.view(x.size(0), *geometry.out_size(x.size(1), x.size(2)), x.size(3))


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, chunk: int = POINTS_PER_CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (n, h', w', c), of the result -> the gradients of x, offset and mask, each in its shape and dtype."""
    compute, group, k = compute_dtype(x, offset, mask), geometry.group, geometry.points
    n, height, width, channels = x.shape
    table = _table(x, group, compute)
    grad_table = torch.zeros_like(table)
    grad_offset, grad_mask = (
        offset.new_empty(len(grad.flatten(0, 2)), group, k, 2),
        mask.new_empty(len(grad.flatten(0, 2)), group, k),
    )
    offsets, masks, grads = (
        offset.reshape(grad_offset.shape),
        mask.reshape(grad_mask.shape),
        grad.reshape(-1, group, channels // group),
    )
    for part in _chunks(len(masks), group * k, chunk):
        points, m = _points(x, offsets[part], part.start, geometry, compute), masks[part].to(compute)
        of_bags = grads[part].to(compute).reshape(-1, channels // group)  # (p g, c / g)
        above_left, above_right, below_left, below_right = (
            _products(of_bags, rows, points.index) for rows in _corners(table, x, group)
        )
        above, below = (
            torch.lerp(above_left, above_right, points.right),
            torch.lerp(below_left, below_right, points.right),
        )
        grad_mask[part] = torch.lerp(above, below, points.down)
        m_scaled = m * geometry.offset_scale
        grad_offset[part][..., 0] = torch.lerp(
            above_right.sub_(above_left), below_right.sub_(below_left), points.down
        ).mul_(m_scaled)
        grad_offset[part][..., 1] = below.sub_(above).mul_(m_scaled)

        index, order = points.index.view(-1).sort()
        first, last = int(index[0]), int(index[-1])
        ends = torch.bincount(index - first, minlength=last - first + 1).cumsum(0)
        begins = F.pad(ends[:-1], (1, 0)).to(index.dtype)
        bag = (order // k).to(index.dtype)
        for rows, weight in zip(_corners(grad_table, x, group), _weights(points, m)):
            rows[first : last + 1] += F.embedding_bag(
                bag, of_bags, begins, mode="sum", per_sample_weights=weight.view(-1).index_select(0, order)
            )
    grad_x = grad_table.view(n, height + 2 * BORDER, width + 2 * BORDER, channels)[
        :, BORDER:-BORDER, BORDER:-BORDER
    ]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_x),
        grad_offset.view_as(offset),
        grad_mask.view_as(mask),
    )


def _chunks(positions: int, points: int, chunk: int) -> Iterator[slice]:
    """Slices of the output positions, of `points` points each, that hold about `chunk` points."""
    step = max(1, chunk // points)
    return (slice(begin, min(begin + step, positions)) for begin in range(0, positions, step))


def _table(x: Tensor, group: int, compute: torch.dtype) -> Tensor:
    """x (n, h, w, c) with its border, as (n (h + 4) (w + 4) g, c / g)."""
    return F.pad(x.to(compute), (0, 0, BORDER, BORDER, BORDER, BORDER)).view(-1, x.size(3) // group)


def _corners(table: Tensor, x: Tensor, group: int) -> list[Tensor]:
    """Views of the table in which the index of a corner above and to the left finds the corners above (left, right) and below (left, right)."""
    down = group * (x.size(2) + 2 * BORDER)
    return [table[distance:] for distance in (0, group, down, down + group)]


def _points(x: Tensor, offset: Tensor, begin: int, geometry: Geometry, compute: torch.dtype) -> _Points:
    """offset (p, g, k, 2) of the output positions from the number `begin` on -> their sampling points."""
    n, height, width, _ = x.shape
    out_height, out_width = geometry.out_size(height, width)
    padded_height, padded_width = height + 2 * BORDER, width + 2 * BORDER
    position = torch.arange(begin, begin + len(offset), device=x.device)
    p_k = torch.tensor(geometry.p_k, dtype=compute, device=x.device) * geometry.offset_scale
    corners, distances = [], []
    for axis, side, along in (
        (0, height, position // out_width % out_height),
        (1, width, position % out_width),
    ):
        p0 = (BORDER + geometry.first[axis] + along * geometry.stride[axis]).to(
            compute
        )  # counted from the border's begin: no location inside is negative
        where = torch.add(
            (p0[:, None] + p_k[:, axis]).unsqueeze(1),
            offset[..., 1 - axis].to(compute),
            alpha=geometry.offset_scale,
        )
        distances.append(where.frac())  # NaN for what is not finite
        corners.append(
            F.threshold_(where, BORDER - 1, 0).clamp_(max=side + BORDER).floor_()
        )  # what lies a pixel or more outside goes among the zeros there
    exact = (
        compute if padded_height * padded_width < 2**24 else torch.float64
    )  # fp32 holds no larger whole numbers
    place = torch.add(corners[1].to(exact), corners[0].to(exact), alpha=padded_width)
    rows = n * padded_height * padded_width * geometry.group
    whole = torch.int32 if rows < 2**31 else torch.int64
    image = position // (out_width * out_height)
    base = (image * padded_height * padded_width * geometry.group)[:, None] + torch.arange(
        geometry.group, device=x.device
    )
    index = torch.add(base.to(whole).unsqueeze(2), place.to(whole), alpha=geometry.group)
    return _Points(
        index.clamp_(0, rows - 1 - (padded_width + 1) * geometry.group), *distances
    )  # NaN becomes any number, which is to be an index


def _weights(points: _Points, mask: Tensor) -> Iterator[Tensor]:
    """How much of each corner a point takes: above (left, right) and below (left, right), (p, g, k) each."""
    below = mask * points.down
    for vertical in (mask - below, below):
        right = vertical * points.right
        yield vertical - right
        yield right


def _products(grad: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """The scalar product of each point's row with the gradient of its bag. grad (p g, c / g), index (p, g, k) -> (p, g, k).

    These are the elements of grad rows^T that a sparse matrix of one row per bag has. The values that it holds itself count for nothing.
    """
    _warn_of_sparse()
    begins = torch.arange(0, index.numel() + 1, index.size(-1), dtype=index.dtype, device=index.device)
    wanted = torch.sparse_csr_tensor(
        begins,
        index.view(-1),
        grad.new_zeros(index.numel()),
        size=(len(grad), len(rows)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, grad, rows.mT, beta=0).values().view_as(index)


@functools.cache
def _warn_of_sparse() -> None:
    """Makes torch say, unheard, what it says once per process: that sparse matrices are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0], [], [], size=(0, 0), check_invariants=False)
