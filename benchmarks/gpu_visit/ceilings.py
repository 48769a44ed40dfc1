"""What this card can do at most: matrix products in each format, of several shapes, and bytes a second on the
device and to the host.

Numbers are normally distributed: of zeros a GPU multiplies faster.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timing import seconds_per_call
from torch import Tensor

from gpu_visit.results import identity
from gpu_visit.visit import Visit, data_sheet

TOKENS = 2 * 1297
"""Of two images of 504 x 504."""
SHAPES = (
    (8192, 8192, 8192),
    (16384, 16384, 16384),
    (4096, 4096, 4096),
    (TOKENS, 3200, 9600),
    (TOKENS, 3200, 12800),
    (TOKENS, 12800, 3200),
)
"""(m, k, n): squares, and the products of a block of InternViT-6B."""
REHEARSED = ((64, 64, 64), (48, 32, 96))


def run(visit: Visit) -> None:
    sheet = data_sheet(identity(visit.rehearse)["card"])
    shapes = REHEARSED if visit.rehearse else SHAPES
    for format_, make in PRODUCTS.items():
        peak = {"bf16": sheet.bf16, "TF32": sheet.tf32, "fp32": sheet.fp32}.get(format_) if sheet else None
        for shape in shapes if format_ != "fp32" else shapes[:1]:
            visit.measure(
                "matrix product",
                {"format": format_, "m": shape[0], "k": shape[1], "n": shape[2]},
                lambda make=make, shape=shape: product(
                    visit.device, make, shape, 0.02 if visit.rehearse else 0.4
                ),
                planned={"tflops": peak} if peak else None,
            )
    size = 2**20 if visit.rehearse else 2**31
    for what, peak in (
        ("device to device", sheet and sheet.memory_gbs),
        ("host to device, pinned", sheet and sheet.host_gbs),
        ("device to host, pinned", sheet and sheet.host_gbs),
        ("host to device, pageable", None),
    ):
        visit.measure(
            "bandwidth",
            {"copy": what, "bytes": size},
            lambda what=what: copied(visit.device, what, size, 0.02 if visit.rehearse else 0.5),
            planned={"gbs": peak} if peak else None,
        )


def product(
    device: torch.device,
    make: Callable[[Tensor, Tensor], Callable[[], object]],
    shape: tuple[int, int, int],
    seconds: float,
) -> Mapping[str, Any]:
    m, k, n = shape
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        fastest, median = seconds_per_call(make(a, b), device, seconds=seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {
        "tflops": 2 * m * k * n / fastest / 1e12,
        "median_tflops": 2 * m * k * n / median / 1e12,
        "ms": 1e3 * fastest,
    }


def _bf16(a: Tensor, b: Tensor) -> Callable[[], object]:
    a, b = a.bfloat16(), b.bfloat16()
    out = a @ b
    return lambda: torch.mm(a, b, out=out)


def _fp32(tf32: bool) -> Callable[[Tensor, Tensor], Callable[[], object]]:
    def make(a: Tensor, b: Tensor) -> Callable[[], object]:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        out = a @ b
        return lambda: torch.mm(a, b, out=out)

    return make


def _fp8(rows: bool) -> Callable[[Tensor, Tensor], Callable[[], object]]:
    """e4m3 in, bf16 out; one scale for a tensor, or one for each row of a and column of b. The second matrix
    lies column by column, as the product wants it."""

    def make(a: Tensor, b: Tensor) -> Callable[[], object]:
        if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 9):
            raise RuntimeError("this card has no fp8")
        left, right = a.to(torch.float8_e4m3fn), b.T.contiguous().to(torch.float8_e4m3fn).T
        scales = (
            (torch.ones(len(a), 1, device=a.device), torch.ones(1, b.size(1), device=a.device))
            if rows
            else [torch.ones((), device=a.device)] * 2
        )
        return lambda: torch._scaled_mm(
            left, right, *scales, out_dtype=torch.bfloat16, use_fast_accum=a.is_cuda
        )

    return make


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Callable[[], object]]] = {
    "bf16": _bf16,
    "TF32": _fp32(True),
    "fp8, a scale per tensor": _fp8(False),
    "fp8, a scale per row": _fp8(True),
    "fp32": _fp32(False),
}


def copied(device: torch.device, what: str, size: int, seconds: float) -> Mapping[str, Any]:
    """GB/s: of a copy on the device what is read and written, of others what is sent."""
    pinned = "pinned" in what and device.type == "cuda"
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned) if "host" in what else None
    one = torch.empty(size, dtype=torch.uint8, device=device)
    if host is not None:
        host.random_(255)
    if what == "device to device":
        other = torch.empty_like(one)
        fastest, _ = seconds_per_call(lambda: other.copy_(one), device, seconds=seconds)
        return {"gbs": 2 * size / fastest / 1e9}
    target, source = (one, host) if what.startswith("host") else (host, one)
    fastest, _ = seconds_per_call(
        lambda: target.copy_(source, non_blocking=pinned), device, seconds=seconds, rounds=3
    )
    return {"gbs": size / fastest / 1e9}
