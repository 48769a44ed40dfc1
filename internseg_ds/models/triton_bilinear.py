"""What the Triton kernels that sample maps at fractional places share: which rows a program has, what lies at a place, and where its gradients go.

A row is the channels of one group (or head) at one output position; in memory rows follow each other, and so do the places and weights of each.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_program(rows, BLOCK_R: tl.constexpr):
    """The numbers of this program's rows, in int64, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, row < rows


@triton.jit
def corner_before(y, x, exists, height, width):
    """The corner above and to the left of each place (y, x), the distances from it, and whether any of the four corners counts."""
    top, left = tl.floor(y), tl.floor(x)
    near = (
        exists & (y > -1) & (x > -1) & (y < height) & (x < width)
    )  # not for NaN, which the distances hand on
    return tl.where(near, top, 0).to(tl.int32), tl.where(near, left, 0).to(tl.int32), y - top, x - left, near


@triton.jit
def corner(y, x, near, height, width, PIXEL_STRIDE: tl.constexpr, columns, real):
    """Where the channels of position (y, x) of each row's map begin, and which of them to touch: none outside the map."""
    inside = near & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return ((y.to(tl.int64) * width + x) * PIXEL_STRIDE)[:, None] + columns, inside[:, None] & real


@triton.jit
def add_sample(
    total, source, m, top, left, down, right, near, height, width, PIXEL_STRIDE: tl.constexpr, columns, real
):
    """`total` and m times what lies at each place: the four corners around it, each by its share."""
    p00, i00 = corner(top, left, near, height, width, PIXEL_STRIDE, columns, real)
    p01, i01 = corner(top, left + 1, near, height, width, PIXEL_STRIDE, columns, real)
    p10, i10 = corner(top + 1, left, near, height, width, PIXEL_STRIDE, columns, real)
    p11, i11 = corner(top + 1, left + 1, near, height, width, PIXEL_STRIDE, columns, real)
    total += (m * (1 - down) * (1 - right))[:, None] * tl.load(source + p00, mask=i00, other=0.0).to(
        tl.float32
    )
    total += (m * (1 - down) * right)[:, None] * tl.load(source + p01, mask=i01, other=0.0).to(tl.float32)
    total += (m * down * (1 - right))[:, None] * tl.load(source + p10, mask=i10, other=0.0).to(tl.float32)
    total += (m * down * right)[:, None] * tl.load(source + p11, mask=i11, other=0.0).to(tl.float32)
    return total


@triton.jit
def spread_gradient(
    grad_source,
    source,
    g,
    m,
    top,
    left,
    down,
    right,
    near,
    height,
    width,
    PIXEL_STRIDE: tl.constexpr,
    columns,
    real,
):
    """Adds m times the gradient g of each sample to its four corners in grad_source, by atomic additions. Returns, summed over the channels, the gradient of m,
    and those of the place along its row and its column, without m."""
    p00, i00 = corner(top, left, near, height, width, PIXEL_STRIDE, columns, real)
    p01, i01 = corner(top, left + 1, near, height, width, PIXEL_STRIDE, columns, real)
    p10, i10 = corner(top + 1, left, near, height, width, PIXEL_STRIDE, columns, real)
    p11, i11 = corner(top + 1, left + 1, near, height, width, PIXEL_STRIDE, columns, real)
    v00 = tl.sum(g * tl.load(source + p00, mask=i00, other=0.0).to(tl.float32), 1)
    v01 = tl.sum(g * tl.load(source + p01, mask=i01, other=0.0).to(tl.float32), 1)
    v10 = tl.sum(g * tl.load(source + p10, mask=i10, other=0.0).to(tl.float32), 1)
    v11 = tl.sum(g * tl.load(source + p11, mask=i11, other=0.0).to(tl.float32), 1)
    tl.atomic_add(grad_source + p00, (m * (1 - down) * (1 - right))[:, None] * g, mask=i00, sem="relaxed")
    tl.atomic_add(grad_source + p01, (m * (1 - down) * right)[:, None] * g, mask=i01, sem="relaxed")
    tl.atomic_add(grad_source + p10, (m * down * (1 - right))[:, None] * g, mask=i10, sem="relaxed")
    tl.atomic_add(grad_source + p11, (m * down * right)[:, None] * g, mask=i11, sem="relaxed")
    above, below = v00 + (v01 - v00) * right, v10 + (v11 - v10) * right
    return above + (below - above) * down, (v01 - v00) * (1 - down) + (v11 - v10) * down, below - above
