"""Where DCNv3 samples: the sizes of its tensors and the locations of its points while all offsets are zero.
Plain numbers; computes nothing on tensors. Letters: n images, (h, w) the input's size, c channels.

Source: Wang et al., "InternImage" (CVPR 2023), equation 2, and OpenGVLab/InternImage
`segmentation/ops_dcnv3`, whose order of points and offsets this keeps.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Pair = tuple[int, int]
"""(vertical, horizontal), as in torch's convolutions."""
Settings = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int, float, bool]
"""kernel, stride, pad, dilation, group, offset_scale, remove_center: the fields of `Geometry`, as torch hands
them to an operator."""


class Geometry(NamedTuple):
    """The settings of a DCNv3 operator, and what follows from them.

    A point's location is p0 + (p_k + offset) * offset_scale, in pixels of the input: p0 belongs to the output
    position, p_k to the point's place in the kernel.
    """

    kernel: Pair
    stride: Pair
    pad: Pair
    dilation: Pair
    group: int
    offset_scale: float
    remove_center: bool

    @property
    def points(self) -> int:
        """Number of sampling points of one group at one output position."""
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def centers(self) -> list[Pair]:
        """Each point's place (row, column) in the kernel grid, in the order of offsets and masks: column by
        column, which is the published order."""
        places = [(row, column) for column in range(self.kernel[1]) for row in range(self.kernel[0])]
        if self.remove_center:
            places.remove((self.kernel[0] // 2, self.kernel[1] // 2))
        return places

    @property
    def reach(self) -> Pair:
        """Distance from the middle of the kernel to its first row and column: p_k of place (0, 0) is minus
        this."""
        return (
            self.dilation[0] * (self.kernel[0] - 1) // 2,
            self.dilation[1] * (self.kernel[1] - 1) // 2,
        )

    @property
    def p_k(self) -> list[Pair]:
        """Each point's displacement from the middle of the kernel, before offset_scale."""
        return [
            (row * self.dilation[0] - self.reach[0], column * self.dilation[1] - self.reach[1])
            for row, column in self.centers
        ]

    @property
    def first(self) -> Pair:
        """p0 of the output position (0, 0); the others follow at distances of the stride."""
        return self.reach[0] - self.pad[0], self.reach[1] - self.pad[1]

    def out_size(self, height: int, width: int) -> Pair:
        """(height, width) of the result for an input of this size, as of a convolution."""
        return self._out_side(height, 0), self._out_side(width, 1)

    def _out_side(self, side: int, axis: int) -> int:
        window = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (side + 2 * self.pad[axis] - window) // self.stride[axis] + 1


def check_center(kernel: Sequence[int], remove_center: bool) -> None:
    """Raise ValueError where there is no middle point that remove_center could leave out, or no other
    point."""
    if remove_center and not all(side % 2 for side in kernel):
        raise ValueError(
            f"remove_center=True needs a kernel with a middle point, of odd sides, not {tuple(kernel)}"
        )
    if remove_center and tuple(kernel) == (1, 1):
        raise ValueError("remove_center=True leaves a kernel of 1 x 1 no point")


def geometry(x: Tensor, offset: Tensor, mask: Tensor, settings: Settings) -> Geometry:
    """Make the geometry of a call of the operator `dcnv3`, whose arguments these are.

    Raises ValueError where the tensors' shapes do not match it or each other: kernels read memory without
    checking bounds.
    """
    kernel, stride, pad, dilation, group, offset_scale, remove_center = settings
    made = Geometry(
        _pair(kernel), _pair(stride), _pair(pad), _pair(dilation), group, offset_scale, remove_center
    )
    check_center(made.kernel, remove_center)
    if x.dim() != 4 or x.size(3) % group:
        raise ValueError(
            f"the input of DCNv3 has the shape {tuple(x.shape)}; it must be (n, h, w, c) with c divisible "
            f"by group={group}"
        )
    positions = (x.size(0), *made.out_size(x.size(1), x.size(2)))
    for name, tensor, last in (
        ("offset", offset, 2 * group * made.points),
        ("mask", mask, group * made.points),
    ):
        if tuple(tensor.shape) != (*positions, last):
            raise ValueError(
                f"the {name} of DCNv3 has the shape {tuple(tensor.shape)}; for this input and {made} it "
                f"must be {(*positions, last)}"
            )
    return made


def _pair(values: Sequence[int]) -> Pair:
    vertical, horizontal = values
    return vertical, horizontal
