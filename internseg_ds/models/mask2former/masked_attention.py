"""Attention with a mask per query, as Mask2Former's decoder needs it: mmcv's module in names and arguments,
torch's fused kernel inside.

torch's `nn.MultiheadAttention`, which mmcv's module wraps, would compute and keep all attention weights (1.2
GB a layer for the 200 queries of the published head at 896 x 896). It also reads the weights of its child
`out_proj` without calling it, so that ZeRO-3, which gathers weights in hooks of the modules that are called,
needs to be told (see models/external_parameters.py). Letters: b images, q queries, k keys, c channels.
"""

from typing import Any

import torch.nn.functional as F
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.runner import BaseModule
from torch import Tensor, nn


class FusedMultiheadAttention(nn.MultiheadAttention):
    """torch's parameters and initial values. Tokens come first: (q, b, c)."""

    def forward(  # type: ignore[override]  # mmcv's module calls it, with these
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """query: (q, b, c), key and value: (k, b, c), attn_mask: (b, 1 or heads, q, k) bool, true where a
        query must not attend. Returns (q, b, c) in the dtype of the query."""
        weights = self.in_proj_weight.split(self.embed_dim)  # of q, k and v
        biases = self.in_proj_bias.split(self.embed_dim)
        # (n, b, c) -> (b, heads, n, c / heads)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(2, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if attn_mask is None else ~attn_mask  # the fused kernel's is true where a query attends
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.permute(2, 0, 1, 3).flatten(2))


class MaskedAttention(BaseModule):
    """mmcv's `MultiheadAttention`, with its arguments, for masks (b, 1 or heads, q, k). Tokens come first:
    (q, b, c).

    Raises ValueError for batch_first=True.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dropout_layer: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__(init_cfg)
        if batch_first:
            raise ValueError(
                "MultiheadAttention of Mask2FormerHead takes tokens first; drop batch_first=True"
            )
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.batch_first = False
        self.attn = FusedMultiheadAttention(embed_dims, num_heads, attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = build_dropout(dropout_layer) if dropout_layer else nn.Identity()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """query: (q, b, c), to which query_pos (q, b, c) is added. key: (k, b, c), default query, to which
        key_pos (k, b, c) is added, in self-attention by default query_pos. value: (k, b, c), default key.
        attn_mask: (b, 1 or heads, q, k) bool, true where a query must not attend. Returns (q, b, c) in the
        dtype of the query, with identity (q, b, c), default query, added."""
        identity = query if identity is None else identity
        key = query if key is None else key
        value = key if value is None else value
        if key_pos is None and query_pos is not None and query_pos.shape == key.shape:
            key_pos = query_pos
        query = query if query_pos is None else query + query_pos
        key = key if key_pos is None else key + key_pos
        return identity + self.dropout_layer(self.proj_drop(self.attn(query, key, value, attn_mask)))
