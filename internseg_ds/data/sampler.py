"""The order of training images: one endless seeded stream, cut into global batches, of which each rank takes
its part.

    stream position p  ->  image permutation(seed, epoch = p // length)[p % length]
    step k             ->  positions [start + k * G, start + (k + 1) * G),
                           G = world size x micro-batch x accumulation
    micro-batch j, rank r of that step  ->  the (j * world size + r)-th run of `micro_batch` positions

So the k-th global batch holds the same images whatever the number of processes, the gradient accumulation and
the data workers, and the number of images seen so far is all that a resume needs.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler

from internseg_ds.seeding import derived_seed


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of one rank, as lists of (stream position, image index); a batch sampler for
    torch's DataLoader."""

    def __init__(
        self,
        length: int,
        micro_batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        """length: images in the data set. start: stream position of the first image, the number of images
        seen so far by all ranks together.

        Gradient accumulation needs no mention: the next step's micro-batches follow in the same way.
        """
        self.length, self.micro_batch, self.rank, self.world_size, self.seed, self.start = (
            length,
            micro_batch,
            rank,
            world_size,
            seed,
            start,
        )
        self._permutation = lru_cache(maxsize=2)(self._draw)  # an epoch's end may lie inside a batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start + self.rank * self.micro_batch
        while True:
            yield [(position, self.image(position)) for position in range(first, first + self.micro_batch)]
            first += self.world_size * self.micro_batch

    def image(self, position: int) -> int:
        """The image at a position of the stream."""
        epoch, offset = divmod(position, self.length)
        return int(self._permutation(epoch)[offset])

    def _draw(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        return torch.randperm(self.length, generator=generator)
