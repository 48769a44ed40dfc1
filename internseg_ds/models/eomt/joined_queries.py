"""Queries among the tokens of a plain transformer: they stand in front of all tokens in the last blocks, and
are split off again behind each.

In: a backbone that can run its blocks one by one, an image, queries. Out: queries and patches as the last
norm gives them, before each of these blocks and behind the last. Letters: b images, q queries, p prefix
tokens (class, registers), n = h w patches, c channels. Source: Kerssies et al., "Your ViT is Secretly an
Image Segmentation Model", 2025, section 3.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Attended = Callable[[int, Tensor, Tensor], Tensor | None]
"""Which patches the queries attend to in a block: (number of the block among the last ones, queries (b, q, c),
patches (b, c, h, w)) -> (b, q, n) bool, true where a query attends; None where all attend to all."""


class Tokens(NamedTuple):
    """What the first block is given."""

    values: Tensor
    """(b, p + n, c): prefix tokens, then the patches row by row."""
    grid: tuple[int, int]
    """(h, w) in patches."""
    context: Any
    """What `run_block` wants again in each block (rotary positions, say)."""


class QueryBackbone(Protocol):
    """What is needed of a backbone. Its `forward(image, queries, last_blocks=, attended=)` returns
    `with_queries(self, ...)`, so that hooks of the backbone see the image and all that comes out."""

    num_blocks: int
    """Blocks that queries could pass; 0 where the model is no plain transformer whose attention takes
    masks."""
    num_prefix_tokens: int
    final_norm: bool
    """Whether `last_norm` is the model's own norm."""

    def tokens(self, image: Tensor) -> Tokens:
        """image: (b, 3, h', w')."""

    def run_block(self, index: int, values: Tensor, context: Any, mask: Tensor | None = None) -> Tensor:
        """Block `index`, from 0, of tokens (b, m, c), of which the last n are the patches; others have no
        position. mask: (b, 1, m, m) bool, true where the first token attends to the second."""

    def last_norm(self, values: Tensor) -> Tensor:
        """(b, m, c) -> the same shape."""


def with_queries(
    backbone: QueryBackbone,
    image: Tensor,
    queries: Tensor,
    last_blocks: int,
    attended: Attended | None,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Run all blocks of the backbone, the last ones with queries in front of the tokens.

    image: (b, 3, h', w'). queries: (b, q, c). attended: asked before each of the last blocks; None: all attend
    to all. Returns the queries (b, q, c) and the patches (b, c, h, w), in the dtype that the backbone computes
    in: last_blocks + 1 pairs.
    """
    values, grid, context = backbone.tokens(image)
    first = backbone.num_blocks - last_blocks
    for index in range(first):
        values = backbone.run_block(index, values, context)
    values = torch.cat((queries.to(values.dtype), values), dim=1)
    count = queries.size(1)
    stages = []
    for number in range(last_blocks):
        stages.append(_split(backbone.last_norm(values), count, grid))
        inside = attended(number, *stages[-1]) if attended is not None else None
        mask = attention_mask(inside, backbone.num_prefix_tokens) if inside is not None else None
        values = backbone.run_block(first + number, values, context, mask)
    stages.append(_split(backbone.last_norm(values), count, grid))
    return tuple(stages)


def attention_mask(inside: Tensor, prefix: int) -> Tensor:
    """inside: (b, q, n) bool, where a query attends to a patch -> (b, 1, m, m) for all m = q + p + n tokens:
    queries attend to queries and prefix tokens too, all others to everything."""
    queries, patches = inside.shape[1:]
    of_queries = F.pad(inside, (queries + prefix, 0), value=True)
    return F.pad(of_queries, (0, 0, 0, prefix + patches), value=True)[:, None]


def _split(values: Tensor, queries: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """values: (b, q + p + n, c) -> (b, q, c), (b, c, h, w)."""
    height, width = grid
    patches = values[:, values.size(1) - height * width :]
    return values[:, :queries], patches.mT.unflatten(2, (height, width)).contiguous()
