"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", 2021, equation 3) for any build of mmcv,
whose compiled operators it never calls.

mmcv's module (names of parameters, initial values) is the base class; the computation is
`deformable_attention_operator`'s. Letters: b images, n queries, N tokens of all maps (the sum of their h w),
c channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor

from internseg_ds.models.layers import vector_on_device
from internseg_ds.models.sampling.deformable_attention_operator import deformable_attention


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's `MultiScaleDeformableAttention` (its arguments and parameters), of tokens (n, b, c) or, with
    batch_first, (b, n, c)."""

    def init_weights(self) -> None:
        """As mmcv's, once the weights are whole.

        mmcv's constructor calls this too, where ZeRO-3 may have partitioned the weights already; the engine
        calls it again with the weights gathered.
        """
        if self.value_proj.weight.dim() == 2:
            super().init_weights()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        *,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        **_: Any,
    ) -> Tensor:
        """Tokens of all maps, one map after the other, attend to some points of each map.

        query: (n, b, c). value: (N, b, c), default query. query_pos, like query, is added to the query;
        identity (default query) is added to the result. reference_points: (b, n, levels, 2) float32 in [0,
        1], horizontal first. spatial_shapes: (height, width) of each map. With batch_first b comes before n.
        Returns (n, b, c) in the dtype of the query. Further arguments of mmcv's layers are ignored.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)  # (n, b, c) -> (b, n, c)
        per_point = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value).unflatten(2, (self.num_heads, -1))  # (b, N, heads, c / heads)
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1).view(per_point)
        sizes = vector_on_device(
            [side for height, width in spatial_shapes for side in (width, height)], query
        ).view(-1, 2)
        offsets = self.sampling_offsets(query).view(*per_point, 2) / sizes[:, None]  # pixels -> [0, 1]
        locations = reference_points[:, :, None, :, None] + offsets
        attended = self.output_proj(attend(value, spatial_shapes, locations, weights))
        return self.dropout(attended if self.batch_first else attended.transpose(0, 1)) + identity


def attend(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of samples of the maps in `value`, bilinear between pixels and 0 outside. Does not
    wait for the device.

    value: (b, N, heads, c). shapes: (h, w) of each map. locations: (b, n, heads, levels, points, 2) in [0,
    1], horizontal first. weights: (b, n, heads, levels, points). Any float dtypes. Returns (b, n, heads * c)
    in the dtype of the value.
    """
    return deformable_attention(value, locations, weights, [side for shape in shapes for side in shape])


def pixel_centres(shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Centres of the pixels of some maps, row by row and map by map, in [0, 1] x [0, 1], horizontal first:
    (N, 2) on the device of `like`.

    In float32 at least (float64 where `like` is), because bf16 has 8 significant bits: 128 values
    between 0.5 and 1.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    centres = []
    for shape in shapes:
        rows, columns = ((torch.arange(size, dtype=dtype, device=like.device) + 0.5) / size for size in shape)
        centres.append(torch.stack([columns.expand(shape), rows[:, None].expand(shape)], -1).flatten(0, 1))
    return torch.cat(centres)
