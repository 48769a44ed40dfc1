"""Multi-scale deformable attention as Triton kernels for GPUs: nothing is compiled at install, and nothing beside inputs and results is kept in memory.

In and out: see `deformable_attention_operator`. All sums are fp32. A program computes some rows, a row being the channels of one head of one query. In the
backward pass a row owns the gradients of its locations and weights; that of the value, which points of many rows share, is summed by atomic additions
into fp32, in no certain order: two runs may differ in the last bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from internseg_ds.models.triton_bilinear import add_sample, corner_before, rows_of_program, spread_gradient

ELEMENTS = {"forward": 512, "backward": 256}
"""Rows x channels of one program of 4 warps: with twice as many, programs take 150 registers a thread instead of some 70 (sm_90), so that half as many warps
hide the waiting for memory, and fp32 over four maps spills. Not timed on a GPU."""
SIZES = ["rows", "queries", "tokens"]
"""Numbers that depend on images' sizes, for which no kernel is compiled anew: Triton would where one is 1 or 16 divides it. It does not look into tuples for
this, so that those of heights and widths come as 2 h + 1, which neither is."""


@triton.jit
def _start(
    rows,
    queries,
    tokens,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The rows of this program: their numbers, which of them exist, channels and which of these exist, and where those of the first map begin."""
    row, exists = rows_of_program(rows, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)[None, :]
    columns = ((row // HEADS // queries * tokens * HEADS + row % HEADS) * CHANNELS)[:, None] + channel
    return row, exists, channel, channel < CHANNELS, columns


@triton.jit
def _locate(locations, at, exists, height, width):
    """Places in pixels of (row, column) `at`, of a map of this size."""
    x = tl.load(locations + 2 * at, mask=exists, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * at + 1, mask=exists, other=0.0).to(tl.float32) * height - 0.5
    return corner_before(y, x, exists, height, width)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    value,
    locations,
    weights,
    out,
    rows,
    queries,
    tokens,
    odd_heights,
    odd_widths,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """CHANNELS: of a head. odd_heights, odd_widths: tuples of LEVELS numbers, 2 h + 1 each. Pointers to contiguous tensors as the operator takes them."""
    row, exists, channel, real, columns = _start(rows, queries, tokens, HEADS, CHANNELS, BLOCK_R, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        height, width = odd_heights[level] // 2, odd_widths[level] // 2
        for point in range(POINTS):
            at = (row * LEVELS + level) * POINTS + point
            top, left, down, right, near = _locate(locations, at, exists, height, width)
            m = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            total = add_sample(
                total, value, m, top, left, down, right, near, height, width, HEADS * CHANNELS, columns, real
            )
        columns += tl.cast(height, tl.int64) * width * HEADS * CHANNELS  # the next map
    tl.store(
        out + row[:, None] * CHANNELS + channel, total.to(out.dtype.element_ty), mask=exists[:, None] & real
    )


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad,
    value,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    rows,
    queries,
    tokens,
    odd_heights,
    odd_widths,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As `forward_kernel`; grad_value is fp32 and zero before."""
    row, exists, channel, real, columns = _start(rows, queries, tokens, HEADS, CHANNELS, BLOCK_R, BLOCK_C)
    g = tl.load(grad + row[:, None] * CHANNELS + channel, mask=exists[:, None] & real, other=0.0).to(
        tl.float32
    )
    for level in tl.static_range(LEVELS):
        height, width = odd_heights[level] // 2, odd_widths[level] // 2
        for point in range(POINTS):
            at = (row * LEVELS + level) * POINTS + point
            top, left, down, right, near = _locate(locations, at, exists, height, width)
            m = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            of_m, along_row, along_column = spread_gradient(
                grad_value,
                value,
                g,
                m,
                top,
                left,
                down,
                right,
                near,
                height,
                width,
                HEADS * CHANNELS,
                columns,
                real,
            )
            tl.store(grad_weights + at, of_m.to(grad_weights.dtype.element_ty), mask=exists)
            tl.store(
                grad_locations + 2 * at,
                (m * width * along_row).to(grad_locations.dtype.element_ty),
                mask=exists,
            )
            tl.store(
                grad_locations + 2 * at + 1,
                (m * height * along_column).to(grad_locations.dtype.element_ty),
                mask=exists,
            )
        columns += tl.cast(height, tl.int64) * width * HEADS * CHANNELS


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """As the operator, but for fp64."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    out = value.new_empty(*weights.shape[:2], value.size(2) * value.size(3))
    _launch(forward_kernel, (value, locations, weights, out), value, weights, shapes, ELEMENTS["forward"])
    return out


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (b, n, heads * c), of the result -> the gradients of value, locations and weights, each in its shape and dtype."""
    grad, value, locations, weights = (
        grad.contiguous(),
        value.contiguous(),
        locations.contiguous(),
        weights.contiguous(),
    )
    grads = (
        torch.zeros_like(value, dtype=torch.float32),
        torch.empty_like(locations),
        torch.empty_like(weights),
    )
    _launch(
        backward_kernel,
        (grad, value, locations, weights, *grads),
        value,
        weights,
        shapes,
        ELEMENTS["backward"],
    )
    return grads[0].to(value.dtype), *grads[1:]


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    value: Tensor,
    weights: Tensor,
    shapes: Sequence[tuple[int, int]],
    elements: int,
) -> None:
    batch, queries, heads, levels, points = weights.shape
    rows = batch * queries * heads
    if rows == 0 or value.size(3) == 0:
        return
    odd_heights, odd_widths = (tuple(2 * side + 1 for side in sides) for sides in zip(*shapes))
    known = constants(heads, value.size(3), levels, points, elements)
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(rows, known["BLOCK_R"]),)](
            *tensors, rows, queries, value.size(1), odd_heights, odd_widths, **known, num_warps=4
        )


def constants(heads: int, channels: int, levels: int, points: int, elements: int) -> dict[str, int]:
    """What a kernel is compiled for, by the names of its arguments."""
    block_c = triton.next_power_of_2(channels)
    return {
        "HEADS": heads,
        "CHANNELS": channels,
        "LEVELS": levels,
        "POINTS": points,
        "BLOCK_R": max(1, elements // block_c),
        "BLOCK_C": block_c,
    }
