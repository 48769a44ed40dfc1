"""The DCNv3 operator by torch's `grid_sample`, whole and without a loop: what an exported program has in its place.

In and out: see `dcnv3_operator`, but for NaN: an offset that is not finite need not make the result NaN. It takes
the memory of all samples at once (k times that of the input). Letters: n images, (h, w) the input's size, (h', w')
the output's, c channels, g groups, k points of a group.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.models.intern_image.dcnv3_geometry import Geometry
from internseg_ds.models.intern_image.dcnv3_geometry import geometry as geometry_of
from internseg_ds.models.layers import vector_on_device
from internseg_ds.models.sampling.implementations import compute_dtype


def dcnv3(
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
) -> Tensor:
    """x: (n, h, w, c), offset: (n, h', w', g * k * 2), mask: (n, h', w', g * k) -> (n, h', w', c) in the dtype of
    x."""
    geometry = geometry_of(
        x, offset, mask, (kernel, stride, pad, dilation, group, offset_scale, remove_center)
    )
    compute = compute_dtype(x, offset, mask)
    n, out_height, out_width, _ = mask.shape
    positions, points = out_height * out_width, geometry.points
    # (n, h, w, g c') -> (n g, c', h, w)
    maps = x.to(compute).unflatten(3, (group, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    offset = offset.to(compute).view(n, out_height, out_width, group, points, 2)
    grid = _grid(offset, (x.size(1), x.size(2)), geometry)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(n * group, positions, points, 2)
    shares = mask.to(compute).view(n, positions, group, points).transpose(1, 2)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    out = (sampled * shares.reshape(n * group, 1, positions, points)).sum(-1)  # (n g, c', h' w')
    return out.view(n, x.size(3), positions).mT.reshape(n, out_height, out_width, x.size(3)).to(x.dtype)


def _grid(offset: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Locations of the points in [-1, 1] from edge to edge of the input, horizontal first, as grid_sample takes
    them. offset: (n, h', w', g, k, 2) in pixels, horizontal first. size: (h, w). Returns the shape of offset."""
    coordinates = []
    for axis, side in ((1, size[1]), (0, size[0])):
        along = torch.arange(offset.size(1 + axis), device=offset.device).to(offset.dtype)
        begins = geometry.first[axis] + along * geometry.stride[axis]  # (h') or (w')
        begins = begins[:, None] if axis else begins[:, None, None]
        points = vector_on_device([place[axis] for place in geometry.p_k], offset)  # (k)
        pixels = begins[..., None] + geometry.offset_scale * (points + offset[..., 1 - axis])
        coordinates.append((2 * pixels + 1) / side - 1)
    return torch.stack(coordinates, -1)
