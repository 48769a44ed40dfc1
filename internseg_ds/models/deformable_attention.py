"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", 2021, equation 3) for any build of mmcv, with a bound on what it keeps.

mmcv's module (names of parameters, initial values) is the base; its forward calls a CUDA kernel wherever there is a GPU, also where mmcv was compiled
without. Here the kernel runs where it is there, and PyTorch's own sampling elsewhere: many samples at once are recomputed in the backward pass.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention, get_compiling_cuda_version
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internseg_ds.models.layers import made_on_device

SAMPLED_AT_ONCE = 2**26
"""Values that PyTorch's sampling makes at a time: 256 MiB in fp32."""


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's `MultiScaleDeformableAttention` (its arguments and parameters), of tokens (n, b, c) or, with batch_first, (b, n, c)."""

    def init_weights(self) -> None:
        """mmcv's constructor calls this too, when ZeRO-3 may hold the weights in pieces already; they get their values once they are whole."""
        if self.value_proj.weight.dim() == 2:
            super().init_weights()

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, identity: Tensor | None = None, query_pos: Tensor | None = None,
                *, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]], **_: Any) -> Tensor:
        """The tokens of all maps, one map after the other, look at a few places of each.

        query: (n, b, c); value: the same number of tokens, default query. query_pos is added to the query, identity (default query) to the result.
        reference_points: (b, n, levels, 2) in [0, 1], horizontal first. spatial_shapes: (height, width) of each map. Returns (n, b, c).
        """
        value, identity = query if value is None else value, query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)  # (n, b, c) -> (b, n, c)
        places = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value).unflatten(2, (self.num_heads, -1))  # (b, n, c) -> (b, n, heads, c / heads)
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1).view(places)
        sizes = made_on_device([side for height, width in spatial_shapes for side in (width, height)], query).view(-1, 2)
        locations = reference_points[:, :, None, :, None] + self.sampling_offsets(query).view(*places, 2) / sizes[:, None]
        attended = self.output_proj(attend(value, spatial_shapes, locations, weights, self.im2col_step))
        return self.dropout(attended if self.batch_first else attended.transpose(0, 1)) + identity


def attend(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, im2col_step: int = 64) -> Tensor:
    """The weighted sum of `value` at some places of its maps, bilinear between pixels and 0 outside.

    value: (b, sum of h w, heads, width). shapes: (h, w) of each map. locations: (b, n, heads, levels, points, 2) in [0, 1], horizontal first. weights:
    (b, n, heads, levels, points). Returns (b, n, heads * width).
    """
    if value.is_cuda and has_kernel():
        sizes = torch.tensor(shapes, device=value.device)
        starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
        return MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, im2col_step)
    per_query = value.size(0) * value.size(2) * value.size(3) * weights.size(-1)
    some = max(1, SAMPLED_AT_ONCE // per_query)
    if weights.size(1) <= some:
        return _sampled(value, shapes, locations, weights)
    chunks = zip(locations.split(some, dim=1), weights.split(some, dim=1), strict=True)
    return torch.cat([checkpoint(_sampled, value, shapes, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks], dim=1)


@functools.cache
def has_kernel() -> bool:
    """Whether mmcv was compiled with its CUDA operators."""
    return get_compiling_cuda_version() != "not available"


def _sampled(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`attend`, by PyTorch's operators."""
    batch, _, heads, width = value.shape
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in shapes], dim=2)  # (b, n, heads, c) -> (b heads, c, h w)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (b, n, heads, levels, points, 2) -> (b heads, n, levels, points, 2)
    shares = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (b, n, heads, levels, points) -> (b heads, 1, n, levels, points)
    total: Tensor | float = 0.0
    for level, shape in enumerate(shapes):
        sampled = F.grid_sample(maps[level].unflatten(2, shape), grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (sampled * shares[:, :, :, level]).sum(-1)  # (b heads, c, n, points) -> (b heads, c, n)
    return total.view(batch, heads * width, -1).transpose(1, 2)
