"""An exponential moving average of the weights, in shards: each rank averages the fp32 master weights of its
own ZeRO partitions, so that no rank holds the whole average.

average <- average + (1 - decay) * (weight - average) after each step (Polyak and Juditsky, 1992). Frozen
parameters and batch-norm statistics are not averaged: with the average, too, they are those of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from internseg_ds.checkpoints.zero_checkpoint import What, ZeroCheckpoint
from internseg_ds.distributed.zero_internals import copy_master_weights_to_model, fp32_partitions, fragment_of


class ShardedEma:
    """The moving average of one engine's weights. Every rank makes the same calls.

    Attributes: shards (one 1-d fp32 tensor for each of `fp32_partitions`, of its size).
    """

    def __init__(self, engine: Any, decay: float) -> None:
        """engine: DeepSpeed's, initialised; the average starts at its weights. decay: the fraction of the
        average that remains at each step, 0.999 for instance."""
        self.engine = engine
        self.decay = decay
        self.shards = [partition.data.to(torch.float32, copy=True) for partition in fp32_partitions(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Once after each optimizer step. Not collective."""
        for shard, partition in zip(self.shards, fp32_partitions(self.engine), strict=True):
            shard.lerp_(partition.data.to(shard.dtype), 1 - self.decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the engine's module computes with the average. Afterwards it has its weights back, bit by
        bit. Collective on entering and on leaving."""
        kept = self._put_in_place()
        try:
            yield
        finally:
            self._put_back(kept)

    @torch.no_grad()
    def _put_in_place(self) -> list[Tensor]:
        """Returns the weights. In fp32 they take the place of the average, so that only one partition at a
        time takes more memory; in bf16 they are a copy, since the average would not come back from bf16."""
        kept = []
        for shard, partition in zip(self.shards, fp32_partitions(self.engine), strict=True):
            weights = partition.data.clone()
            partition.data.copy_(shard)
            kept.append(shard.copy_(weights) if weights.dtype == shard.dtype else weights)
        copy_master_weights_to_model(self.engine)
        return kept

    @torch.no_grad()
    def _put_back(self, kept: list[Tensor]) -> None:
        """kept: what `_put_in_place` returned."""
        for shard, weights, partition in zip(self.shards, kept, fp32_partitions(self.engine), strict=True):
            average = partition.data.clone() if weights is shard else shard
            partition.data.copy_(weights)
            shard.copy_(average)
        copy_master_weights_to_model(self.engine)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shards, for its file (`EMA_FILE`) of a ZeRO checkpoint, in the layout of the fp32
        master weights there."""
        return {"decay": self.decay, "ema_flat_groups": self.shards}

    def restore(self, checkpoint: ZeroCheckpoint) -> None:
        """Continues the average of a checkpoint of any stage and number of processes; starts at its weights
        where it has no average."""
        what: What = "ema" if checkpoint.has_ema else "fp32"
        for name, param in self.engine.module.named_parameters():
            if fragment := fragment_of(self.engine, param):
                shard = self.shards[fragment.partition]
                shard[fragment.in_partition] = checkpoint.read_slice(
                    name, fragment.start, fragment.stop, what
                )
