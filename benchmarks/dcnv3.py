r"""Forward and backward of the DCNv3 operator at the shapes of InternImage's four stages: our versions against
grid_sample through autograd, \ in turn, in one run.

    python benchmarks/dcnv3.py             InternImage-T at 512 x 512, on a GPU in bf16, else on one core in fp32
    python benchmarks/dcnv3.py --size h --side 896 --images 2    InternImage-H, on a GPU

The published CUDA extension takes part where it can be imported (`import DCNv3`, on a GPU). Memory is what a
pass takes beside its inputs, at its peak; on a CPU, the growth of resident memory in the first, untimed
round. Ends with a line of JSON: ratio (our seconds over those of grid_sample, all stages, median of the
rounds).
"""

import argparse
import ctypes
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import finish, reset_peak
from torch import Tensor

from internseg_ds.device import device_type
from internseg_ds.models.intern_image import dcnv3_torch
from internseg_ds.models.intern_image.dcnv3_geometry import Geometry
from internseg_ds.models.intern_image.dcnv3_operator import dcnv3, implementation

SIZES = {
    "t": (64, 4),
    "s": (80, 5),
    "b": (112, 7),
    "l": (160, 10),
    "xl": (192, 12),
    "h": (320, 10),
    "g": (512, 16),
}
"""Channels and groups of the first stage; each further one has twice as many."""
ARGUMENTS = ((3, 3), (1, 1), (1, 1), (1, 1))
Operator = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def inputs(
    images: int, side: int, channels: int, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Features, offsets of a pixel or so, masks; and the gradient of the result."""
    torch.manual_seed(0)
    x, grad = (torch.randn(images, side, side, channels, device=device, dtype=dtype) for _ in range(2))
    offset = torch.randn(images, side, side, 18 * group, device=device)
    mask = torch.randn(images, side, side, group, 9, device=device).softmax(-1).flatten(-2)
    return x.requires_grad_(), offset.requires_grad_(), mask.requires_grad_(), grad


def ours(x: Tensor, offset: Tensor, mask: Tensor, group: int) -> Tensor:
    return dcnv3(x, offset, mask, *ARGUMENTS, group, 1.0, False)


class OutOfPyTorch(torch.autograd.Function):
    """Our version for any device, where the operator would choose the Triton kernels."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, offset: Tensor, mask: Tensor, group: int
    ) -> Tensor:
        ctx.save_for_backward(x, offset, mask)
        ctx.geometry = Geometry(*ARGUMENTS, group, 1.0, False)
        return dcnv3_torch.forward(x, offset, mask, ctx.geometry)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *dcnv3_torch.backward(grad, *ctx.saved_tensors, ctx.geometry), None


def by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor, group: int) -> Tensor:
    """Every sample at once, in fp32, and autograd for the backward pass."""
    n, height, width, channels = x.shape
    # (horizontal, vertical)
    p_k = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], device=x.device)
    row, column = torch.meshgrid(
        torch.arange(height, device=x.device), torch.arange(width, device=x.device), indexing="ij"
    )
    at = (
        torch.stack([column, row], -1).view(1, height, width, 1, 1, 2)
        + p_k
        + offset.view(n, height, width, group, 9, 2)
    )
    grid = (2 * at + 1) / torch.tensor([width, height], device=x.device) - 1
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(n * group, height * width, 9, 2)
    maps = (
        x.float()
        .view(n, height, width, group, -1)
        .permute(0, 3, 4, 1, 2)
        .reshape(n * group, -1, height, width)
    )
    # (n g, c / g, h w, k)
    samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = mask.view(n, height * width, group, 9).transpose(1, 2).reshape(n * group, 1, height * width, 9)
    return (
        (samples * weights)
        .sum(-1)
        .view(n, group, -1, height, width)
        .permute(0, 3, 4, 1, 2)
        .reshape(n, height, width, channels)
        .to(x.dtype)
    )


def published() -> Operator | None:
    """The CUDA extension of OpenGVLab/InternImage, fp32 as its offsets are, or None where it cannot be
    imported."""
    try:
        import DCNv3
    except ImportError:
        return None
    more = (False,) if float(importlib.metadata.version("DCNv3")) > 1.0 else ()  # remove_center came with 1.1

    class Published(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: torch.autograd.function.FunctionCtx, x: Tensor, offset: Tensor, mask: Tensor, group: int
        ) -> Tensor:
            ctx.save_for_backward(x, offset, mask)
            ctx.numbers = (3, 3, 1, 1, 1, 1, 1, 1, group, x.size(3) // group, 1.0)
            return DCNv3.dcnv3_forward(x, offset, mask, *ctx.numbers, 256, *more)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
            return *DCNv3.dcnv3_backward(
                *ctx.saved_tensors, *ctx.numbers, grad.contiguous(), 256, *more
            ), None

    return lambda x, offset, mask, group: Published.apply(x.float(), offset, mask, group).to(x.dtype)


def measured(
    operator: Operator, given: tuple[Tensor, ...], group: int, *, first: bool
) -> tuple[float, int, list[Tensor]]:
    """Seconds of a forward and backward pass, the most bytes that it took, and the result with its
    gradients."""
    *leaves, grad = given
    finish(grad.device)
    if first and grad.device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes freed (glibc)
    before = memory(grad.device, peak=False)
    reset_peak(grad.device)
    began = time.perf_counter()
    out = operator(*leaves, group)
    gradients = torch.autograd.grad(out, leaves, grad)
    finish(grad.device)
    seconds = time.perf_counter() - began
    return seconds, memory(grad.device, peak=True) - before, [out.detach(), *gradients]


def memory(device: torch.device, *, peak: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM" if peak else "VmRSS")
    )
    return 1024 * int(line.split()[1])


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """The arguments, with those that benchmarks of one operator share, and the device to measure on: a GPU,
    or one thread of the CPU."""
    parser.add_argument("--images", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each, in turn (default: %(default)s)"
    )
    device = torch.device(device_type())
    if device.type == "cpu":
        torch.set_num_threads(1)
    return parser.parse_args(), device


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/dcnv3.py --size t --side 512",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="t", help="of InternImage (default: %(default)s)")
    parser.add_argument(
        "--side", type=int, default=512, help="of the images, in pixels (default: %(default)s)"
    )
    args, device = parsed(parser)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    operators: dict[str, Operator] = {"ours": ours}
    if device.type == "cuda":
        operators["out of PyTorch"] = lambda *tensors: OutOfPyTorch.apply(*tensors)
        if (extension := published()) is not None:
            operators["published"] = extension
    operators["grid_sample"] = by_grid_sample

    channels, group = SIZES[args.size]
    total: dict[str, list[float]] = {name: [0.0] * args.rounds for name in operators}
    print(
        f"InternImage-{args.size.upper()}, {args.images} image(s) of {args.side} x {args.side}, "
        f"{str(dtype).removeprefix('torch.')} on {device.type}"
    )
    for stage in range(4):
        side = args.side // 4 // 2**stage
        given = inputs(args.images, side, channels << stage, group << stage, dtype, device)
        if not stage:
            print(f"ours: {implementation(*given[:3]).__name__.rpartition('.')[2]}")
        seconds, peaks, results = {name: [] for name in operators}, {}, {}
        for number in range(args.rounds + 1):  # the first warms up
            for name, operator in operators.items():
                took, taken, results[name] = measured(operator, given, group << stage, first=not number)
                if number:
                    seconds[name].append(took)
                    total[name][number - 1] += took
                else:
                    peaks[name] = taken
        for name in operators:
            errors = [
                (one.float() - other.float()).norm() / other.float().norm()
                for one, other in zip(results[name], results["grid_sample"])
            ]
            print(
                f"  {side:3} x {side:3} x {channels << stage:4}  {name:14} "
                f"{1e3 * statistics.median(seconds[name]):9.2f} ms {peaks[name] / 2**20:8.0f} MiB   "
                f"largest difference {max(errors):.1e}"
            )
    for name, values in total.items():
        print(f"{name:14} {1e3 * statistics.median(values):9.2f} ms, all stages")
    ratio = statistics.median(mine / theirs for mine, theirs in zip(total["ours"], total["grid_sample"]))
    print(
        json.dumps(
            {
                "ratio": round(ratio, 3),
                "device": device.type,
                "size": args.size,
                "side": args.side,
                "images": args.images,
                **{
                    name.replace(" ", "_") + "_ms": round(1e3 * statistics.median(values), 3)
                    for name, values in total.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
