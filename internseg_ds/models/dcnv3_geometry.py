"""Where DCNv3 samples: the sizes of its tensors and the locations of its points while all offsets are zero. Plain numbers; computes nothing on tensors.

Source: Wang et al., "InternImage" (CVPR 2023), equation 2, and OpenGVLab/InternImage `segmentation/ops_dcnv3`, whose order of points and offsets this keeps.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Geometry(NamedTuple):
    """Pairs are (vertical, horizontal), as in torch's convolutions. A point's location is p0 + (p_k + offset) * offset_scale, in pixels of the input."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    group: int
    offset_scale: float
    remove_center: bool

    @property
    def points(self) -> int:
        """Of one group at one output position."""
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def centers(self) -> list[tuple[int, int]]:
        """Each point's place (row, column) in the kernel grid, in the order of offsets and masks: the horizontal index is the outer one."""
        places = [(row, column) for column in range(self.kernel[1]) for row in range(self.kernel[0])]
        if self.remove_center:
            places.remove((self.kernel[0] // 2, self.kernel[1] // 2))
        return places

    @property
    def reach(self) -> tuple[int, int]:
        """p_k of the point at place (0, 0) is minus this."""
        return tuple(dilation * (kernel - 1) // 2 for dilation, kernel in zip(self.dilation, self.kernel))

    @property
    def p_k(self) -> list[tuple[int, int]]:
        """Each point's displacement (vertical, horizontal) from the centre, before offset_scale."""
        (down, right), (by_row, by_column) = self.reach, self.dilation
        return [(row * by_row - down, column * by_column - right) for row, column in self.centers]

    @property
    def first(self) -> tuple[int, int]:
        """p0 of the output position (0, 0); the others follow at distances of the stride."""
        return tuple(reach - pad for reach, pad in zip(self.reach, self.pad))

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the result for an input of this size, as of a convolution."""
        return tuple(
            (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for side, pad, dilation, kernel, stride in zip(
                (height, width), self.pad, self.dilation, self.kernel, self.stride
            )
        )


def check_center(kernel: Sequence[int], remove_center: bool) -> None:
    """Raises ValueError where there is no middle point to leave out, or no other point."""
    if remove_center and not all(side % 2 for side in kernel):
        raise ValueError(
            f"remove_center=True needs a kernel with a middle point, of odd sides, not {tuple(kernel)}"
        )
    if remove_center and tuple(kernel) == (1, 1):
        raise ValueError("remove_center=True leaves a kernel of 1 x 1 no point")


def geometry(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    group: int,
    offset_scale: float,
    remove_center: bool,
) -> Geometry:
    """The geometry of a call of the operator. Raises ValueError where the tensors' shapes do not fit it or each other."""
    made = Geometry(
        tuple(kernel), tuple(stride), tuple(pad), tuple(dilation), group, offset_scale, remove_center
    )
    check_center(made.kernel, remove_center)
    if x.dim() != 4 or x.size(3) % group:
        raise ValueError(
            f"the input of DCNv3 has the shape {tuple(x.shape)}; it must be (n, h, w, c) with c divisible by group={group}"
        )
    out = (x.size(0), *made.out_size(x.size(1), x.size(2)))
    for name, tensor, last in (
        ("offset", offset, 2 * group * made.points),
        ("mask", mask, group * made.points),
    ):
        if tuple(tensor.shape) != (*out, last):
            raise ValueError(
                f"the {name} of DCNv3 has the shape {tuple(tensor.shape)}; for this input and {made} it must be {(*out, last)}"
            )
    return made
