"""Bilinear sampling in Triton, shared by the kernels of DCNv3 and of deformable attention: which rows a
program computes, what a feature map holds at a position, and where its gradients go.

A row is the channels of one group (or head) at one output position. In memory rows follow each other, and so
do the positions and weights of each row. Letters: R = BLOCK_R rows of a program; C = BLOCK_C channels, the
next power of two of a group's. All positions and weights are fp32.

Inside a kernel everything is a `tl.tensor`: a pointer, a scalar, or a block of the stated shape. Values that
belong together are passed as tuples:
- corner: (top (R) int32, left (R) int32, down (R) fp32, right (R) fp32, near (R) bool): the corner above and
  to the left of each position, the distances from it, and whether any of the four corners lies on the map;
- size: (height, width) of the map;
- channels: (columns (R, C) int64, real (R, C) or (1, C) bool): for each row, the element offsets of its
  channels at the map's position (0, 0), and which of the C channels exist.

PIXEL_STRIDE is the number of elements from one position of the map to the next.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_program(rows: tl.tensor, BLOCK_R: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """rows: how many there are in all. Returns this program's row numbers (R) int64, and which exist (R)
    bool."""
    # int64: row numbers times channels pass 2^31 on large images
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, row < rows


@triton.jit
def corner_before(y: tl.tensor, x: tl.tensor, exists: tl.tensor, size: tl.tuple) -> tl.tuple:
    """y, x: positions (R) fp32 in pixels of the map; exists: (R) bool. Returns the tuple `corner`."""
    height, width = size
    top, left = tl.floor(y), tl.floor(x)
    # false for NaN, too: such a row reads nothing, and its NaN distances make the result NaN
    near = exists & (y > -1) & (x > -1) & (y < height) & (x < width)
    return tl.where(near, top, 0).to(tl.int32), tl.where(near, left, 0).to(tl.int32), y - top, x - left, near


@triton.jit
def _pixel(
    y: tl.tensor,
    x: tl.tensor,
    near: tl.tensor,
    size: tl.tuple,
    PIXEL_STRIDE: tl.constexpr,
    channels: tl.tuple,
) -> tuple[tl.tensor, tl.tensor]:
    """y, x: (R) int32. Returns the element offsets (R, C) int64 of each row's channels at (y, x), and a
    mask (R, C) bool that is false outside the map and for channels that do not exist."""
    height, width = size
    columns, real = channels
    inside = near & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return ((y.to(tl.int64) * width + x) * PIXEL_STRIDE)[:, None] + columns, inside[:, None] & real


@triton.jit
def add_sample(
    total: tl.tensor,
    source: tl.tensor,
    m: tl.tensor,
    corner: tl.tuple,
    size: tl.tuple,
    PIXEL_STRIDE: tl.constexpr,
    channels: tl.tuple,
) -> tl.tensor:
    """Return total (R, C) fp32 + m (R) fp32 times the bilinear sample of the map `source` at each position.

    source: pointer to the map, any float dtype; the sums are fp32.
    """
    top, left, down, right, near = corner
    p00, i00 = _pixel(top, left, near, size, PIXEL_STRIDE, channels)
    p01, i01 = _pixel(top, left + 1, near, size, PIXEL_STRIDE, channels)
    p10, i10 = _pixel(top + 1, left, near, size, PIXEL_STRIDE, channels)
    p11, i11 = _pixel(top + 1, left + 1, near, size, PIXEL_STRIDE, channels)
    total += (m * (1 - down) * (1 - right))[:, None] * tl.load(source + p00, mask=i00, other=0.0).to(
        tl.float32
    )
    total += (m * (1 - down) * right)[:, None] * tl.load(source + p01, mask=i01, other=0.0).to(tl.float32)
    total += (m * down * (1 - right))[:, None] * tl.load(source + p10, mask=i10, other=0.0).to(tl.float32)
    total += (m * down * right)[:, None] * tl.load(source + p11, mask=i11, other=0.0).to(tl.float32)
    return total


@triton.jit
def spread_gradient(
    grad_source: tl.tensor,
    source: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    corner: tl.tuple,
    size: tl.tuple,
    PIXEL_STRIDE: tl.constexpr,
    channels: tl.tuple,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The backward pass of `add_sample` for a gradient g (R, C) fp32 of `total`.

    Adds m times g to the four corners in grad_source (pointer, fp32) by atomic additions: corners of many
    rows coincide. Returns, summed over the channels, the gradient of m and those of the position along its
    row (x) and along its column (y), without the factor m; (R) fp32 each.
    """
    top, left, down, right, near = corner
    p00, i00 = _pixel(top, left, near, size, PIXEL_STRIDE, channels)
    p01, i01 = _pixel(top, left + 1, near, size, PIXEL_STRIDE, channels)
    p10, i10 = _pixel(top + 1, left, near, size, PIXEL_STRIDE, channels)
    p11, i11 = _pixel(top + 1, left + 1, near, size, PIXEL_STRIDE, channels)
    v00 = tl.sum(g * tl.load(source + p00, mask=i00, other=0.0).to(tl.float32), 1)
    v01 = tl.sum(g * tl.load(source + p01, mask=i01, other=0.0).to(tl.float32), 1)
    v10 = tl.sum(g * tl.load(source + p10, mask=i10, other=0.0).to(tl.float32), 1)
    v11 = tl.sum(g * tl.load(source + p11, mask=i11, other=0.0).to(tl.float32), 1)
    # relaxed: the sums are read after the kernel only, so no order among memory accesses is needed
    tl.atomic_add(grad_source + p00, (m * (1 - down) * (1 - right))[:, None] * g, mask=i00, sem="relaxed")
    tl.atomic_add(grad_source + p01, (m * (1 - down) * right)[:, None] * g, mask=i01, sem="relaxed")
    tl.atomic_add(grad_source + p10, (m * down * (1 - right))[:, None] * g, mask=i10, sem="relaxed")
    tl.atomic_add(grad_source + p11, (m * down * right)[:, None] * g, mask=i11, sem="relaxed")
    above, below = v00 + (v01 - v00) * right, v10 + (v11 - v10) * right
    return above + (below - above) * down, (v01 - v00) * (1 - down) + (v11 - v10) * down, below - above
