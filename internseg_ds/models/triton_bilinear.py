"""What the Triton kernels that sample maps at fractional places share: which rows a program has, and which values lie around a place.

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
    near = exists & (y > -1) & (x > -1) & (y < height) & (x < width)  # not for NaN, which the distances hand on
    return tl.where(near, top, 0).to(tl.int32), tl.where(near, left, 0).to(tl.int32), y - top, x - left, near


@triton.jit
def corner(y, x, near, height, width, PIXEL_STRIDE: tl.constexpr, columns, real):
    """Where the channels of position (y, x) of each row's map begin, and which of them to touch: none outside the map."""
    inside = near & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return ((y.to(tl.int64) * width + x) * PIXEL_STRIDE)[:, None] + columns, inside[:, None] & real
