"""The DCNv3 operator out of PyTorch's own operations, for any device: forward, and the backward pass written
out.

In and out: see `dcnv3_operator`. Memory beside inputs and results is bounded: output positions are taken in
chunks, and the backward pass computes each anew.

A bilinear sample is a weighted sum of four rows of a table that holds, for each position of the zero-padded
input and each group, its channels. The four lie at fixed distances, so one index per point serves the table
and three views of it that begin later; the sums over points are those of `F.embedding_bag`. The gradient of
the table is such a sum too, over the points sorted by their index: no scattered additions. It is what runs
where deterministic algorithms are asked for; whether embedding_bag and sampled_addmm give the same bits in
each run on a GPU was not checked.

Letters: n images, (h, w) the input's size, (h', w') the output's, c channels, g groups, k points of a group;
p output positions of a chunk; T = n (h + 4) (w + 4) g rows of the table. Computation is in fp32, or in fp64
where a tensor is fp64: "compute dtype".
"""

import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.models.intern_image.dcnv3_geometry import Geometry
from internseg_ds.models.sampling.implementations import compute_dtype

POINTS_PER_CHUNK = 1 << 16
"""Sampling points (output positions x groups x points of the kernel) that are computed at once: what is made
of them stays in a CPU's cache."""
BORDER = 2
"""Zeros around the input: so wide that a location a pixel or more outside has only zeros around it, and gets
no gradient."""


class _Points(NamedTuple):
    """The sampling points of p output positions; each field (p, g, k)."""

    table_row: Tensor
    """Row of the table that holds the corner above and to the left of the location, int32 or int64."""
    down: Tensor
    """Vertical distance of the location from that corner, in the compute dtype: 0 to 1, and anything from
    -1 to 1 a pixel or more outside the input; NaN where the location is not finite."""
    right: Tensor
    """Horizontal distance, likewise."""


def forward(
    x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, chunk: int = POINTS_PER_CHUNK
) -> Tensor:
    """x: (n, h, w, c), offset: (n, h', w', g k 2), mask: (n, h', w', g k). Returns (n, h', w', c) in the
    dtype of x.

    chunk: how many points are computed at once.
    """
    compute = compute_dtype(x, offset, mask)
    group, k = geometry.group, geometry.points
    table = _table(x, group, compute)
    offset = offset.reshape(-1, group, k, 2)
    mask = mask.reshape(-1, group, k)
    out = x.new_empty(len(mask), x.size(3))
    for part in _chunks(len(mask), group * k, chunk):
        points = _points(x, offset[part], part.start, geometry, compute)
        bags = points.table_row.view(-1, k)
        sums_at_corners = (
            F.embedding_bag(bags, rows, mode="sum", per_sample_weights=weight.view(-1, k))
            for rows, weight in zip(
                _corners(table, x, group), _weights(points, mask[part].to(compute)), strict=True
            )
        )
        out[part] = functools.reduce(Tensor.add_, sums_at_corners).view(-1, x.size(3))
    return out.view(x.size(0), *geometry.out_size(x.size(1), x.size(2)), x.size(3))


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, chunk: int = POINTS_PER_CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (n, h', w', c), of the result. Returns the gradients of x, offset and mask, each in its shape and
    dtype."""
    compute = compute_dtype(x, offset, mask)
    group, k = geometry.group, geometry.points
    n, height, width, channels = x.shape
    positions = len(grad.flatten(0, 2))
    table = _table(x, group, compute)
    grad_table = torch.zeros_like(table)
    grad_offset = offset.new_empty(positions, group, k, 2)
    grad_mask = mask.new_empty(positions, group, k)
    offset_rows = offset.reshape(grad_offset.shape)
    mask_rows = mask.reshape(grad_mask.shape)
    grad_rows = grad.reshape(positions, group, channels // group)
    for part in _chunks(positions, group * k, chunk):
        points = _points(x, offset_rows[part], part.start, geometry, compute)
        m = mask_rows[part].to(compute)
        bag_grads = grad_rows[part].to(compute).reshape(-1, channels // group)
        grad_mask[part], by_right, by_down = _point_gradients(points, bag_grads, _corners(table, x, group))
        m_scaled = m * geometry.offset_scale
        grad_offset[part][..., 0] = by_right.mul_(m_scaled)
        grad_offset[part][..., 1] = by_down.mul_(m_scaled)
        _add_table_gradient(points, bag_grads, m, _corners(grad_table, x, group))
    grad_x = grad_table.view(n, height + 2 * BORDER, width + 2 * BORDER, channels)[
        :, BORDER:-BORDER, BORDER:-BORDER
    ]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_x),
        grad_offset.view_as(offset),
        grad_mask.view_as(mask),
    )


def _point_gradients(
    points: _Points, bag_grads: Tensor, corners: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """bag_grads: (p g, c / g), the gradient of each bag, a bag being one group at one output position.
    corners: views of the table, as of `_corners`.

    Returns, (p, g, k) each in the compute dtype, the gradients of the mask, and those of the location along
    its row and along its column, without the factors mask and offset_scale.
    """
    above_left, above_right, below_left, below_right = (
        _products(bag_grads, rows, points.table_row) for rows in corners
    )
    above = torch.lerp(above_left, above_right, points.right)
    below = torch.lerp(below_left, below_right, points.right)
    of_mask = torch.lerp(above, below, points.down)
    # in place from here on: these are the largest temporary tensors
    by_right = torch.lerp(above_right.sub_(above_left), below_right.sub_(below_left), points.down)
    by_down = below.sub_(above)
    return of_mask, by_right, by_down


def _add_table_gradient(points: _Points, bag_grads: Tensor, m: Tensor, grad_corners: list[Tensor]) -> None:
    """Add what the points of a chunk contribute to the gradient of the table.

    bag_grads: (p g, c / g). m: (p, g, k), the mask in the compute dtype. grad_corners: views of the table's
    gradient, as of `_corners`.

    Points sorted by their table row form one run for each row between the first and the last: the bags of an
    embedding_bag, which adds them up in a fixed order.
    """
    k = m.size(-1)
    table_row, order = points.table_row.view(-1).sort()
    first = int(table_row[0])
    last = int(table_row[-1])
    ends = torch.bincount(table_row - first, minlength=last - first + 1).cumsum(0)
    begins = F.pad(ends[:-1], (1, 0)).to(table_row.dtype)
    bag = (order // k).to(table_row.dtype)
    for rows, weight in zip(grad_corners, _weights(points, m), strict=True):
        rows[first : last + 1] += F.embedding_bag(
            bag, bag_grads, begins, mode="sum", per_sample_weights=weight.view(-1).index_select(0, order)
        )


def _chunks(positions: int, points: int, chunk: int) -> Iterator[slice]:
    """Slices of the output positions, which have `points` points each, of about `chunk` points."""
    step = max(1, chunk // points)
    return (slice(begin, min(begin + step, positions)) for begin in range(0, positions, step))


def _table(x: Tensor, group: int, compute: torch.dtype) -> Tensor:
    """x: (n, h, w, c) -> (T, c / g) in the compute dtype: x with its border of zeros, a row for each
    position and group."""
    return F.pad(x.to(compute), (0, 0, BORDER, BORDER, BORDER, BORDER)).view(-1, x.size(3) // group)


def _corners(table: Tensor, x: Tensor, group: int) -> list[Tensor]:
    """table: (T, c / g) of x: (n, h, w, c). Returns four views (T or fewer, c / g) of it, in which the
    table row of a point finds the corners above (left, right) and below (left, right)."""
    down = group * (x.size(2) + 2 * BORDER)
    return [table[distance:] for distance in (0, group, down, down + group)]


def _points(x: Tensor, offset: Tensor, begin: int, geometry: Geometry, compute: torch.dtype) -> _Points:
    """The sampling points of some output positions, the first of which has the number `begin`.

    x: (n, h, w, c), for its shape. offset: (p, g, k, 2).
    """
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
        # counted from the border's first row, so that no location inside is negative
        p0 = (BORDER + geometry.first[axis] + along * geometry.stride[axis]).to(compute)
        location = torch.add(
            (p0[:, None] + p_k[:, axis]).unsqueeze(1),
            offset[..., 1 - axis].to(compute),  # offsets are (horizontal, vertical)
            alpha=geometry.offset_scale,
        )
        distances.append(location.frac())  # NaN for what is not finite
        # a location a pixel or more outside is moved among the zeros of the border
        corners.append(F.threshold(location, BORDER - 1, 0, inplace=True).clamp_(max=side + BORDER).floor_())
    # fp32 represents whole numbers up to 2^24 exactly
    exact = compute if padded_height * padded_width < 2**24 else torch.float64
    place = torch.add(corners[1].to(exact), corners[0].to(exact), alpha=padded_width)
    rows = n * padded_height * padded_width * geometry.group
    whole = torch.int32 if rows < 2**31 else torch.int64
    image = position // (out_width * out_height)
    base = (image * padded_height * padded_width * geometry.group)[:, None] + torch.arange(
        geometry.group, device=x.device
    )
    table_row = torch.add(base.to(whole).unsqueeze(2), place.to(whole), alpha=geometry.group)
    # the conversion of NaN gives any integer, which must still be a row; the NaN distances mark the result
    last = rows - 1 - (padded_width + 1) * geometry.group  # whose four corners all exist
    return _Points(table_row.clamp_(0, last), *distances)


def _weights(points: _Points, mask: Tensor) -> Iterator[Tensor]:
    """mask: (p, g, k) in the compute dtype. Yields the weight of each corner of a point: above (left,
    right) and below (left, right), (p, g, k) each."""
    below = mask * points.down
    for vertical in (mask - below, below):
        right = vertical * points.right
        yield vertical - right
        yield right


def _products(bag_grads: Tensor, rows: Tensor, table_row: Tensor) -> Tensor:
    """The scalar product of each point's table row with the gradient of its bag.

    bag_grads: (p g, c / g). rows: (T or fewer, c / g). table_row: (p, g, k). Returns (p, g, k).

    These are the elements of bag_grads rows^T at the places of a sparse matrix that has one row per bag;
    the values of that matrix itself are not used (beta = 0).
    """
    _silence_sparse_warning()
    begins = torch.arange(
        0, table_row.numel() + 1, table_row.size(-1), dtype=table_row.dtype, device=table_row.device
    )
    wanted = torch.sparse_csr_tensor(
        begins,
        table_row.view(-1),
        bag_grads.new_zeros(table_row.numel()),
        size=(len(bag_grads), len(rows)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, bag_grads, rows.mT, beta=0).values().view_as(table_row)


@functools.cache
def _silence_sparse_warning() -> None:
    """Make torch emit its warning that sparse matrices are in beta state, which it does once per process,
    while warnings are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0], [], [], size=(0, 0), check_invariants=False)
