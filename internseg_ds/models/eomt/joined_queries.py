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
Stages = tuple[tuple[Tensor, Tensor], ...]
"""Queries (b, q, c) and patches (b, c, h, w) behind the last norm: before each of the last blocks, and behind
all."""


class Tokens(NamedTuple):
    """What the first block is given."""

    values: Tensor
    """(b, p + n, c): prefix tokens, then the patches row by row."""
    grid: tuple[int, int]
    """(h, w) in patches."""
    context: Any
    """What `run_block` wants again in each block (rotary positions, say)."""


class QueryBackbone(Protocol):
    """What is needed of a backbone. Called as `backbone(image, queries, last_blocks=, attended=)` it returns
    `Stages`: hooks of the backbone see the image, the queries, and all that comes out."""

    num_blocks: int
    """Blocks that queries could pass; 0 where the model is no plain transformer whose attention takes
    masks."""
    final_norm: bool
    """Whether it has the model's last norm, and maps pass it."""


class SteppedBackbone(Protocol):
    """A backbone that can run its blocks one by one, for `with_queries`."""

    num_blocks: int
    num_prefix_tokens: int

    def tokens(self, image: Tensor) -> Tokens:
        """image: (b, 3, h', w')."""

    def run_block(self, index: int, values: Tensor, context: Any, mask: Tensor | None = None) -> Tensor:
        """Block `index`, from 0, of tokens (b, m, c), of which the last n are the patches; others have no
        position. mask: (b, 1, m, m) bool, true where the first token attends to the second."""

    def last_norm(self, values: Tensor) -> Tensor:
        """(b, m, c) -> the same shape."""


class JoinedQueries:
    """The queries on their way through the last blocks of one forward pass.

    queries: (b, q, c). norm: the model's last. grid: (h, w) in patches. attended: asked before each block; None:
    all attend to all.
    """

    def __init__(
        self,
        queries: Tensor,
        norm: Callable[[Tensor], Tensor],
        grid: tuple[int, int],
        attended: Attended | None,
    ) -> None:
        self._queries = queries
        self._norm = norm
        self._grid = grid
        self._attended = attended
        self._stages: list[tuple[Tensor, Tensor]] = []

    def before_block(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """values: the input of the next of the last blocks, (b, p + n, c) of the first of them and (b, q + p + n,
        c) of others. Returns what the block is to be given instead, (b, m, c) with m = q + p + n, and the mask
        of its attention, (b, 1, m, m) bool or None."""
        if not self._stages:
            values = torch.cat((self._queries.to(values.dtype), values), dim=1)
        self._split(values)
        if self._attended is None:
            return values, None
        inside = self._attended(len(self._stages) - 1, *self._stages[-1])
        return values, None if inside is None else attention_mask(inside, values.size(1))

    def stages(self, values: Tensor) -> Stages:
        """values: the output of the last block, (b, q + p + n, c)."""
        self._split(values)
        return tuple(self._stages)

    def _split(self, values: Tensor) -> None:
        """Appends the queries (b, q, c) and the patches (b, c, h, w) among the tokens."""
        values = self._norm(values)
        height, width = self._grid
        patches = values[:, values.size(1) - height * width :]
        queries = values[:, : self._queries.size(1)]
        self._stages.append((queries, patches.mT.unflatten(2, (height, width)).contiguous()))


def with_queries(
    backbone: SteppedBackbone,
    image: Tensor,
    queries: Tensor,
    last_blocks: int,
    attended: Attended | None,
) -> Stages:
    """Run all blocks of the backbone, the last ones with queries (b, q, c) in front of the tokens.

    image: (b, 3, h', w'). Returns last_blocks + 1 stages, in the dtype that the backbone computes in.
    """
    values, grid, context = backbone.tokens(image)
    joined = JoinedQueries(queries, backbone.last_norm, grid, attended)
    first = backbone.num_blocks - last_blocks
    for index in range(backbone.num_blocks):
        mask = None
        if index >= first:
            values, mask = joined.before_block(values)
        values = backbone.run_block(index, values, context, mask)
    return joined.stages(values)


def attention_mask(inside: Tensor, tokens: int) -> Tensor:
    """inside: (b, q, n) bool, where a query attends to a patch; tokens: m = q + p + n -> (b, 1, m, m): queries
    attend to queries and prefix tokens too, all others to everything."""
    queries, patches = inside.shape[1:]
    of_queries = F.pad(inside, (tokens - patches, 0), value=True)
    return F.pad(of_queries, (0, 0, 0, tokens - queries), value=True)[:, None]
