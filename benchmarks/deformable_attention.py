"""Forward and backward of deformable attention at the sizes of Mask2Former's pixel decoder: ours against
PyTorch's sampling, in turn, in one run.

    python benchmarks/deformable_attention.py     Mask2Former at 256 x 256, 8 heads, in fp32, on a GPU or else a core
    python benchmarks/deformable_attention.py --side 896 --heads 32    Mask2Former on InternImage-H, on a GPU

The contender is mmcv's `multi_scale_deformable_attn_pytorch` through autograd; on a GPU our version out of
PyTorch and, where mmcv was compiled with it, mmcv's CUDA operator take part too. Memory is what a pass takes
beside its inputs, at its peak; on a CPU, the growth of resident memory in the first, untimed round. Ends with
a line of JSON: ratio (our seconds over those of mmcv's PyTorch form, median of the rounds).
"""

import argparse
import json
import statistics

import torch
from dcnv3 import measured, parsed
from mmcv.ops import get_compiling_cuda_version
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from torch import Tensor

from internseg_ds.models.sampling import deformable_attention_torch
from internseg_ds.models.sampling.deformable_attention import attend
from internseg_ds.models.sampling.deformable_attention_operator import implementation

POINTS = 4


class OutOfPyTorch(torch.autograd.Function):
    """Our version for any device, where the operator would choose the Triton kernels."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        shapes: list[tuple[int, int]],
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        return deformable_attention_torch.forward(value, locations, weights, shapes)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *deformable_attention_torch.backward(grad, *ctx.saved_tensors, ctx.shapes), None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/deformable_attention.py --side 512",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--side", type=int, default=256, help="of the images, in pixels (default: %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=8, help="of 32 channels each (default: %(default)s)")
    args, device = parsed(parser)
    shapes = [(args.side // stride,) * 2 for stride in (32, 16, 8)]
    tokens = sum(height * width for height, width in shapes)
    torch.manual_seed(0)
    value, grad = (
        torch.randn(args.images, tokens, args.heads, 32, device=device),
        torch.randn(args.images, tokens, args.heads * 32, device=device),
    )
    centres = torch.cat(
        [
            torch.cartesian_prod(*2 * [(torch.arange(side, device=device) + 0.5) / side]).flip(-1)
            for side, _ in shapes
        ]
    )
    sizes = torch.tensor(shapes, device=device)
    # of two pixels or so
    offsets = 2 * torch.randn(args.images, tokens, args.heads, len(shapes), POINTS, 2, device=device)
    locations = centres[:, None, None, None] + offsets / sizes.flip(-1)[:, None]
    weights = (
        torch.randn(args.images, tokens, args.heads, len(shapes) * POINTS, device=device)
        .softmax(-1)
        .unflatten(-1, (len(shapes), POINTS))
    )
    given = value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_(), grad

    operators = {"ours": lambda value, locations, weights, _: attend(value, shapes, locations, weights)}
    if device.type == "cuda":
        operators["out of PyTorch"] = lambda value, locations, weights, _: OutOfPyTorch.apply(
            value, locations, weights, shapes
        )
        if get_compiling_cuda_version() != "not available":
            starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
            operators["mmcv's CUDA"] = lambda value, locations, weights, _: (
                MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
            )
    operators["mmcv's PyTorch"] = lambda value, locations, weights, _: multi_scale_deformable_attn_pytorch(
        value, sizes, locations, weights
    )

    print(
        f"{args.images} image(s) of {args.side} x {args.side}: {tokens} tokens, {args.heads} heads of 32, "
        f"{len(shapes)} maps, {POINTS} points, fp32 on "
        f"{device.type}; ours: {implementation(*given[:3]).__name__.rpartition('.')[2]}"
    )
    seconds, peaks, results = {name: [] for name in operators}, {}, {}
    for number in range(args.rounds + 1):  # the first warms up
        for name, operator in operators.items():
            took, taken, results[name] = measured(operator, given, args.heads, first=not number)
            if number:
                seconds[name].append(took)
            else:
                peaks[name] = taken
    for name in operators:
        errors = [
            (one - other).norm() / other.norm()
            for one, other in zip(results[name], results["mmcv's PyTorch"])
        ]
        print(
            f"  {name:15} {1e3 * statistics.median(seconds[name]):9.2f} ms {peaks[name] / 2**20:8.0f} MiB  "
            f" largest difference {max(errors):.1e}"
        )
    ratio = statistics.median(
        mine / theirs for mine, theirs in zip(seconds["ours"], seconds["mmcv's PyTorch"])
    )
    print(
        json.dumps(
            {
                "ratio": round(ratio, 3),
                "device": device.type,
                "side": args.side,
                "heads": args.heads,
                "images": args.images,
                **{
                    name.replace("'s", "").replace(" ", "_") + "_ms": round(
                        1e3 * statistics.median(values), 3
                    )
                    for name, values in seconds.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
