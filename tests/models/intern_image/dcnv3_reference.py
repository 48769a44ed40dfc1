"""DCNv3 as a loop over output positions, groups and points, written from its formula; autograd differentiates
it. Slow, and exact in fp64."""

import itertools
import math

import torch
from torch import Tensor

CASES = {
    "plain": (2, 5, 6, 5, ((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False)),
    "no center, stride, dilation": (1, 7, 8, 12, ((3, 3), (2, 1), (1, 2), (1, 2), 1, 1.5, True)),
    "even oblong kernel": (1, 6, 5, 20, ((2, 4), (1, 2), (0, 2), (2, 1), 3, 0.7, False)),
    "5 x 5 on a map that is smaller": (1, 3, 2, 16, ((5, 5), (1, 1), (2, 2), (1, 1), 1, 1.0, True)),
}
"""Name: images, height, width, channels of a group, and the arguments of the operator: kernel, stride, pad,
dilation (vertical, horizontal), group, offset_scale, remove_center."""


def tensors(case: str, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Input, offsets (some lead outside) and masks in fp64."""
    n, height, width, channels, (kernel, stride, pad, dilation, group, _, remove_center) = CASES[case]
    torch.manual_seed(0)
    out = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip((height, width), kernel, stride, pad, dilation)
    ]
    points = group * (kernel[0] * kernel[1] - remove_center)
    return (
        torch.randn(n, height, width, group * channels, dtype=torch.float64),
        spread * torch.randn(n, *out, 2 * points, dtype=torch.float64),
        torch.rand(n, *out, points, dtype=torch.float64),
    )


def dcnv3_by_loops(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    group: int,
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    n, height, width, channels = x.shape
    places = [
        (i, j)
        for i in range(kernel[1])
        for j in range(kernel[0])
        if not (remove_center and (i, j) == (kernel[1] // 2, kernel[0] // 2))
    ]
    middle_x, middle_y = dilation[1] * (kernel[1] - 1) // 2, dilation[0] * (kernel[0] - 1) // 2
    pixels = x.unflatten(-1, (group, channels // group))
    offset, mask = offset.unflatten(-1, (group, len(places), 2)), mask.unflatten(-1, (group, len(places)))
    rows = []
    for b, row, column, g in itertools.product(
        range(n), range(mask.size(1)), range(mask.size(2)), range(group)
    ):
        total = x.new_zeros(channels // group)
        for k, (i, j) in enumerate(places):
            across, along = offset[b, row, column, g, k]
            at_x = (
                column * stride[1] - pad[1] + middle_x + (i * dilation[1] - middle_x + across) * offset_scale
            )
            at_y = row * stride[0] - pad[0] + middle_y + (j * dilation[0] - middle_y + along) * offset_scale
            for px, py in itertools.product(
                (math.floor(at_x.item()), math.floor(at_x.item()) + 1),
                (math.floor(at_y.item()), math.floor(at_y.item()) + 1),
            ):
                if 0 <= px < width and 0 <= py < height:
                    total = (
                        total
                        + mask[b, row, column, g, k]
                        * (1 - (at_x - px).abs())
                        * (1 - (at_y - py).abs())
                        * pixels[b, py, px, g]
                    )
        rows.append(total)
    return torch.stack(rows).view(n, mask.size(1), mask.size(2), channels)


def gradients_by_loops(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *arguments: object
) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, offset, mask)]
    return torch.autograd.grad(dcnv3_by_loops(*inputs, *arguments), inputs, grad)
