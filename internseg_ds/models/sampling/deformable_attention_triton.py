"""Multi-scale deformable attention as Triton kernels for GPUs: nothing is compiled at install, and no memory
is used beside inputs and results.

In and out: see `deformable_attention_operator`. All sums are fp32. A program computes some rows, a row being
the channels of one head of one query. In the backward pass a row owns the gradients of its locations and
weights, and writes them. The gradient of the value, which points of many rows share, is summed by atomic
additions into fp32, in no fixed order: two runs may differ in the last bit. Letters: b images, n queries, c
channels of a head; R, C and the tuples corner, size and channels as in `triton_bilinear`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from internseg_ds.models.sampling.triton_bilinear import (
    add_sample,
    corner_before,
    rows_of_program,
    spread_gradient,
)

ELEMENTS = {"forward": 512, "backward": 256}
"""Rows x channels of one program of 4 warps.

With twice as many, programs take 150 registers a thread instead of some 70 (sm_90), so half as many warps
are there to hide the latency of memory, and fp32 over four maps spills. Chosen from the compiler's
figures, not timed on a GPU."""
SIZES = ["rows", "queries", "tokens"]
"""Arguments that depend on the images' sizes, for whose values no kernel is compiled anew.

Triton would otherwise specialise where one is 1 or divisible by 16. It has no such switch for the elements
of a tuple, so heights and widths are passed as 2 h + 1, which is neither."""


@triton.jit
def _start(
    rows: tl.tensor,
    queries: tl.tensor,
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns this program's row numbers (R), which exist (R), channel numbers (1, C), which exist (1, C),
    and the element offsets (R, C) of each row's channels at the first pixel of the first map."""
    row, exists = rows_of_program(rows, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)[None, :]
    columns = ((row // HEADS // queries * tokens * HEADS + row % HEADS) * CHANNELS)[:, None] + channel
    return row, exists, channel, channel < CHANNELS, columns


@triton.jit
def _locate(locations: tl.tensor, at: tl.tensor, exists: tl.tensor, size: tl.tuple) -> tl.tuple:
    """locations: pointer, (horizontal, vertical) in [0, 1] for each `at` (R). Returns the tuple `corner`."""
    height, width = size
    # 0 to 1 from edge to edge: the centre of the first pixel is at half a pixel
    x = tl.load(locations + 2 * at, mask=exists, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * at + 1, mask=exists, other=0.0).to(tl.float32) * height - 0.5
    return corner_before(y, x, exists, size)


# Kernels take more than a few arguments because Triton passes tensors, sizes and constants one by one.


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    queries: tl.tensor,
    tokens: tl.tensor,
    odd_heights: tl.tuple,
    odd_widths: tl.tuple,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """value, locations, weights, out: pointers to contiguous tensors in the operator's shapes and dtypes.
    odd_heights, odd_widths: LEVELS numbers 2 h + 1 and 2 w + 1. CHANNELS: of a head."""
    row, exists, channel, real, columns = _start(rows, queries, tokens, HEADS, CHANNELS, BLOCK_R, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        height, width = odd_heights[level] // 2, odd_widths[level] // 2
        for point in range(POINTS):
            at = (row * LEVELS + level) * POINTS + point
            corner = _locate(locations, at, exists, (height, width))
            m = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            total = add_sample(total, value, m, corner, (height, width), HEADS * CHANNELS, (columns, real))
        columns += tl.cast(height, tl.int64) * width * HEADS * CHANNELS  # the next map
    tl.store(
        out + row[:, None] * CHANNELS + channel, total.to(out.dtype.element_ty), mask=exists[:, None] & real
    )


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad: tl.tensor,
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    grad_value: tl.tensor,
    grad_locations: tl.tensor,
    grad_weights: tl.tensor,
    rows: tl.tensor,
    queries: tl.tensor,
    tokens: tl.tensor,
    odd_heights: tl.tuple,
    odd_widths: tl.tuple,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """As `forward_kernel`. grad: of `out`, in its shape and dtype. The other gradients are in the shapes
    of their tensors; grad_value is fp32 and zero before."""
    row, exists, channel, real, columns = _start(rows, queries, tokens, HEADS, CHANNELS, BLOCK_R, BLOCK_C)
    g = tl.load(grad + row[:, None] * CHANNELS + channel, mask=exists[:, None] & real, other=0.0).to(
        tl.float32
    )
    for level in tl.static_range(LEVELS):
        height, width = odd_heights[level] // 2, odd_widths[level] // 2
        for point in range(POINTS):
            at = (row * LEVELS + level) * POINTS + point
            corner = _locate(locations, at, exists, (height, width))
            m = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            of_m, along_row, along_column = spread_gradient(
                grad_value, value, g, m, corner, (height, width), HEADS * CHANNELS, (columns, real)
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
    """Shapes and dtypes as of the operator, but not float64. shapes: (h, w) of each map."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    out = value.new_empty(*weights.shape[:2], value.size(2) * value.size(3))
    _launch(forward_kernel, (value, locations, weights, out), value, weights, shapes, ELEMENTS["forward"])
    return out


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (b, n, heads * c), of the result. Returns the gradients of value, locations and weights, each
    in its shape and dtype."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_locations = torch.empty_like(locations)
    grad_weights = torch.empty_like(weights)
    _launch(
        backward_kernel,
        (grad.contiguous(), value, locations, weights, grad_value, grad_locations, grad_weights),
        value,
        weights,
        shapes,
        ELEMENTS["backward"],
    )
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    value: Tensor,
    weights: Tensor,
    shapes: Sequence[tuple[int, int]],
    elements: int,
) -> None:
    """tensors: the kernel's pointer arguments. value, weights: those among them, for their shapes.
    elements: rows x channels of a program."""
    batch, queries, heads, levels, points = weights.shape
    rows = batch * queries * heads
    if rows == 0 or value.size(3) == 0:
        return
    odd_heights = tuple(2 * height + 1 for height, _ in shapes)
    odd_widths = tuple(2 * width + 1 for _, width in shapes)
    known = constants(heads, value.size(3), levels, points, elements)
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(rows, known["BLOCK_R"]),)](
            *tensors, rows, queries, value.size(1), odd_heights, odd_widths, **known, num_warps=4
        )


def constants(heads: int, channels: int, levels: int, points: int, elements: int) -> dict[str, int]:
    """The values that a kernel is compiled for, by the names of its arguments.

    channels: of a head. elements: rows x channels of a program, as in `ELEMENTS`.
    """
    block_c = triton.next_power_of_2(channels)
    return {
        "HEADS": heads,
        "CHANNELS": channels,
        "LEVELS": levels,
        "POINTS": points,
        "BLOCK_R": max(1, elements // block_c),
        "BLOCK_C": block_c,
    }
