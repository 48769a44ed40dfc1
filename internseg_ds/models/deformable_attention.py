"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", 2021, equation 3) for any build of mmcv, whose compiled operators it never calls.

mmcv's module (names of parameters, initial values) is the base; what it computes is `deformable_attention_operator`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor

from internseg_ds.models.deformable_attention_operator import deformable_attention
from internseg_ds.models.layers import made_on_device


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's `MultiScaleDeformableAttention` (its arguments and parameters), of tokens (n, b, c) or, with batch_first, (b, n, c)."""

    def init_weights(self) -> None:
        """mmcv's constructor calls this too, when ZeRO-3 may hold the weights in pieces already; they get their values once they are whole."""
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
        """The tokens of all maps, one map after the other, look at a few places of each.

        query: (n, b, c); value: the same number of tokens, default query. query_pos is added to the query, identity (default query) to the result.
        reference_points: (b, n, levels, 2) in [0, 1], horizontal first. spatial_shapes: (height, width) of each map. Returns (n, b, c).
        """
        value, identity = query if value is None else value, query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)  # (n, b, c) -> (b, n, c)
        places = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value).unflatten(
            2, (self.num_heads, -1)
        )  # (b, n, c) -> (b, n, heads, c / heads)
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1).view(places)
        sizes = made_on_device(
            [side for height, width in spatial_shapes for side in (width, height)], query
        ).view(-1, 2)
        locations = (
            reference_points[:, :, None, :, None]
            + self.sampling_offsets(query).view(*places, 2) / sizes[:, None]
        )
        attended = self.output_proj(attend(value, spatial_shapes, locations, weights))
        return self.dropout(attended if self.batch_first else attended.transpose(0, 1)) + identity


def attend(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of `value` at some places of its maps, bilinear between pixels and 0 outside. It waits for no device.

    value: (b, sum of h w, heads, width). shapes: (h, w) of each map. locations: (b, n, heads, levels, points, 2) in [0, 1], horizontal first. weights:
    (b, n, heads, levels, points). Returns (b, n, heads * width).
    """
    return deformable_attention(value, locations, weights, [side for shape in shapes for side in shape])


def pixel_centres(shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Of each pixel of some maps, row by row, where its middle lies in [0, 1] x [0, 1], horizontal first: (sum of h w, 2), in fp32 at least, since bf16
    knows 256 places there."""
    dtype, found = torch.promote_types(like.dtype, torch.float32), []
    for shape in shapes:
        rows, columns = ((torch.arange(size, dtype=dtype, device=like.device) + 0.5) / size for size in shape)
        found.append(torch.stack([columns.expand(shape), rows[:, None].expand(shape)], -1).flatten(0, 1))
    return torch.cat(found)
