"""The DCNv3 operator as Triton kernels for GPUs: nothing is compiled at install, and no memory is used beside
inputs and results.

In and out: see `dcnv3_operator`. All sums are fp32. A program computes some rows, a row being the channels of
one group at one output position; in memory they follow each other, and so do their offsets and masks. In the
backward pass a row owns the gradients of its offsets and masks, and writes them. The gradient of the input,
which points of many rows share, is summed by atomic additions into fp32, in no fixed order: two runs may
differ in the last bit, so `dcnv3_operator` does not choose these kernels under
`torch.use_deterministic_algorithms`. Letters: n images, (h, w) the input's size, (h', w') the output's, g
groups, c channels, k points of a group; R, C and the tuples corner, size and channels as in
`triton_bilinear`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internseg_ds.models.intern_image.dcnv3_geometry import Geometry
from internseg_ds.models.sampling.triton_bilinear import (
    add_sample,
    corner_before,
    rows_of_program,
    spread_gradient,
)

ELEMENTS = {"forward": 1024, "backward": 512}
"""Rows x channels of one program of 4 warps: 8 and 4 elements a thread. The backward pass holds twice as
many values per element (the gradient, four corners, their products), so it gets half the elements for the
same registers."""
SIZES = ["rows", "height", "width", "out_height", "out_width"]
"""Arguments for whose values no kernel is compiled anew. Triton would otherwise specialise where one is 1 or
divisible by 16, and images have many sizes."""


@triton.jit
def _start(
    rows: tl.tensor, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, out_height: tl.tensor, out_width: tl.tensor
) -> tl.tuple:
    """Returns this program's row numbers, which of them exist, and the group, output column, output row
    and image of each; (R) int64 each, (R) bool the second."""
    row, exists = rows_of_program(rows, BLOCK_R)
    position = row // GROUP
    return (
        row,
        exists,
        row % GROUP,
        position % out_width,
        position // out_width % out_height,
        position // out_width // out_height,
    )


@triton.jit
def _locate(
    offset: tl.tensor,
    at: tl.tensor,
    exists: tl.tensor,
    center: tl.tuple,
    k: tl.tensor,
    scale: tl.tensor,
    size: tl.tuple,
    grid: tl.tuple,
) -> tl.tuple:
    """Where point k of each row samples; returns the tuple `corner`.

    offset: pointer, (horizontal, vertical) for each point `at` (R) int64. center: (y (R), x (R)) fp32, the
    middle of each row's kernel. grid: the kernel's constants (KERNEL_H, REACH_Y, REACH_X, DILATION_Y,
    DILATION_X, CENTER). CENTER is the place of the point that `remove_center` leaves out, the middle one of
    2 CENTER + 1, or the number of places where none is left out; either way k + k // CENTER is the place of
    point k.
    """
    KERNEL_H, REACH_Y, REACH_X, DILATION_Y, DILATION_X, CENTER = grid
    center_y, center_x = center
    place = k + k // CENTER
    off_x = tl.load(offset + 2 * at, mask=exists, other=0.0).to(tl.float32)
    off_y = tl.load(offset + 2 * at + 1, mask=exists, other=0.0).to(tl.float32)
    y = center_y + (place % KERNEL_H * DILATION_Y - REACH_Y + off_y) * scale
    x = center_x + (place // KERNEL_H * DILATION_X - REACH_X + off_x) * scale
    return corner_before(y, x, exists, size)


# Kernels take more than a few arguments because Triton passes tensors, sizes and constants one by one.


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x: tl.tensor,
    offset: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    first_y: tl.tensor,
    first_x: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    KERNEL_H: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """x, offset, mask, out: pointers to contiguous tensors in the operator's shapes and dtypes. CHANNELS:
    of a group. K: points of a group. The others: see `_launch` and `constants`."""
    row, exists, group, column, line, image = _start(rows, GROUP, BLOCK_R, out_height, out_width)
    channel = tl.arange(0, BLOCK_C)[None, :]
    real = channel < CHANNELS
    columns = ((image * height * width * GROUP + group) * CHANNELS)[:, None] + channel
    center_y = (first_y + line * stride_y).to(tl.float32)
    center_x = (first_x + column * stride_x).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for k in range(K):
        at = row * K + k
        corner = _locate(
            offset,
            at,
            exists,
            (center_y, center_x),
            k,
            scale,
            (height, width),
            (KERNEL_H, REACH_Y, REACH_X, DILATION_Y, DILATION_X, CENTER),
        )
        m = tl.load(mask + at, mask=exists, other=0.0).to(tl.float32)
        total = add_sample(total, x, m, corner, (height, width), GROUP * CHANNELS, (columns, real))
    tl.store(
        out + row[:, None] * CHANNELS + channel, total.to(out.dtype.element_ty), mask=exists[:, None] & real
    )


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    offset: tl.tensor,
    mask: tl.tensor,
    grad_x: tl.tensor,
    grad_offset: tl.tensor,
    grad_mask: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    first_y: tl.tensor,
    first_x: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    KERNEL_H: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """As `forward_kernel`. grad: of `out`, in its shape and dtype. The other gradients are in the shapes
    of their tensors; grad_x is fp32 and zero before."""
    row, exists, group, column, line, image = _start(rows, GROUP, BLOCK_R, out_height, out_width)
    channel = tl.arange(0, BLOCK_C)[None, :]
    real = channel < CHANNELS
    columns = ((image * height * width * GROUP + group) * CHANNELS)[:, None] + channel
    center_y = (first_y + line * stride_y).to(tl.float32)
    center_x = (first_x + column * stride_x).to(tl.float32)
    g = tl.load(grad + row[:, None] * CHANNELS + channel, mask=exists[:, None] & real, other=0.0).to(
        tl.float32
    )
    for k in range(K):
        at = row * K + k
        corner = _locate(
            offset,
            at,
            exists,
            (center_y, center_x),
            k,
            scale,
            (height, width),
            (KERNEL_H, REACH_Y, REACH_X, DILATION_Y, DILATION_X, CENTER),
        )
        m = tl.load(mask + at, mask=exists, other=0.0).to(tl.float32)
        of_m, along_row, along_column = spread_gradient(
            grad_x, x, g, m, corner, (height, width), GROUP * CHANNELS, (columns, real)
        )
        tl.store(grad_mask + at, of_m.to(grad_mask.dtype.element_ty), mask=exists)
        tl.store(grad_offset + 2 * at, (m * scale * along_row).to(grad_offset.dtype.element_ty), mask=exists)
        tl.store(
            grad_offset + 2 * at + 1, (m * scale * along_column).to(grad_offset.dtype.element_ty), mask=exists
        )


def forward(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
    """x: (n, h, w, c), offset: (n, h', w', g k 2), mask: (n, h', w', g k); any float dtypes but float64.
    Returns (n, h', w', c) in the dtype of x."""
    x, offset, mask = x.contiguous(), offset.contiguous(), mask.contiguous()
    out = x.new_empty(*mask.shape[:3], x.size(3))
    _launch(forward_kernel, (x, offset, mask, out), x, out, geometry, ELEMENTS["forward"])
    return out


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (n, h', w', c), of the result. Returns the gradients of x, offset and mask, each in its shape and
    dtype."""
    grad, x, offset, mask = grad.contiguous(), x.contiguous(), offset.contiguous(), mask.contiguous()
    grad_x = torch.zeros_like(x, dtype=torch.float32)
    grad_offset = torch.empty_like(offset)
    grad_mask = torch.empty_like(mask)
    _launch(
        backward_kernel,
        (grad, x, offset, mask, grad_x, grad_offset, grad_mask),
        x,
        grad,
        geometry,
        ELEMENTS["backward"],
    )
    return grad_x.to(x.dtype), grad_offset, grad_mask


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    x: Tensor,
    out: Tensor,
    geometry: Geometry,
    elements: int,
) -> None:
    """tensors: the kernel's pointer arguments. x: (n, h, w, c), out: (n, h', w', c), those among them, for
    their shapes. elements: rows x channels of a program."""
    rows = out.size(0) * out.size(1) * out.size(2) * geometry.group
    channels = x.size(3) // geometry.group
    if rows == 0:
        return
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, elements // block_c)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(rows, block_r),)](
            *tensors,
            rows,
            x.size(1),
            x.size(2),
            out.size(1),
            out.size(2),
            *geometry.first,
            *geometry.stride,
            geometry.offset_scale,
            **constants(geometry, channels),
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
        )


def constants(geometry: Geometry, channels: int) -> dict[str, int]:
    """The values that a kernel is compiled for, by the names of its arguments, but for the block's size.

    channels: of a group. CENTER: see `_locate`.
    """
    kernel_h, kernel_w = geometry.kernel
    center = kernel_w // 2 * kernel_h + kernel_h // 2 if geometry.remove_center else kernel_h * kernel_w
    return {
        "GROUP": geometry.group,
        "CHANNELS": channels,
        "K": geometry.points,
        "KERNEL_H": kernel_h,
        "REACH_Y": geometry.reach[0],
        "REACH_X": geometry.reach[1],
        "DILATION_Y": geometry.dilation[0],
        "DILATION_X": geometry.dilation[1],
        "CENTER": center,
    }
