"""An exponential moving average of the weights, kept in shards: each rank averages the fp32 masters that ZeRO gave it, so that nobody holds it whole.

average <- average + (1 - decay) * (weight - average) after each step (Polyak and Juditsky, 1992). Frozen parameters and batch-norm statistics are not
averaged; they are those of the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.partitions import partitions, place_of, weights_follow


class ShardedEma:
    """The average of one engine's weights. Every rank makes the same calls."""

    def __init__(self, engine: Any, decay: float) -> None:
        """engine: DeepSpeed's, initialised; the average starts at its weights. decay: what remains of the average at each step, 0.999 say."""
        self.engine, self.decay = engine, decay
        self.shards = [master.data.clone() for master in partitions(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Once after each optimizer step. Talks to no other rank."""
        for shard, master in zip(self.shards, partitions(self.engine), strict=True):
            shard.lerp_(master.data, 1 - self.decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the engine's module computes with the average. Collective at both ends; the weights come back to the last bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for shard, master in zip(self.shards, partitions(self.engine), strict=True):
            held = master.data.clone()
            master.data.copy_(shard)
            shard.copy_(held)
        weights_follow(self.engine)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard, for a file beside its others of a ZeRO checkpoint (`EMA_FILE`), in the layout of the masters."""
        return {"decay": self.decay, "ema_flat_groups": self.shards}

    def restore(self, checkpoint: ZeroCheckpoint) -> None:
        """Takes the average up from a checkpoint of any stage and number of processes; from its weights where it has none."""
        for name, param in self.engine.module.named_parameters():
            if place := place_of(self.engine, param):
                self.shards[place.partition][place.held] = checkpoint.read_slice(
                    name, place.start, place.stop, "ema" if checkpoint.has_ema else "fp32"
                )
