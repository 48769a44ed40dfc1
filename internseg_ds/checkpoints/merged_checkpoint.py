"""A ZeRO checkpoint of a run with low-rank adapters, read as the model without them: each adapted weight is W +
(alpha / rank) B A, under the name that it has there.

In: a `ZeroCheckpoint`. Out: the same reading interface with plain names. Products are computed in fp32 for the
slice that is asked for, so that consolidation needs no more memory than without adapters.
"""

from typing import Any

import torch
from torch import Tensor

from internseg_ds.checkpoints.zero_checkpoint import What, ZeroCheckpoint
from internseg_ds.errors import CheckpointError
from internseg_ds.lora_names import factor_names, is_factor, plain_name


class MergedCheckpoint:
    """What `weights_of` and `consolidate` read of a ZeroCheckpoint: path, manifest, shapes, buffers,
    read_slice, check_holds."""

    def __init__(self, checkpoint: ZeroCheckpoint) -> None:
        """Raises CheckpointError where nothing says by what the adapters are scaled."""
        self._checkpoint = checkpoint
        self.path, self.manifest = checkpoint.path, checkpoint.manifest
        self.check_holds = checkpoint.check_holds
        self._scale = _scale_of(checkpoint)
        self._own_names = {plain_name(name): name for name in checkpoint.shapes if not is_factor(name)}
        self.shapes = {plain: checkpoint.shapes[name] for plain, name in self._own_names.items()}
        self.buffers = {plain_name(name): value for name, value in checkpoint.buffers.items()}

    def read_slice(self, name: str, start: int, stop: int, what: What = "fp32") -> Tensor:
        """Elements [start, stop) of a parameter laid out flat, (stop - start,) float32, with its adapter. Raises
        CheckpointError as `ZeroCheckpoint.read_slice` does."""
        checkpoint = self._checkpoint
        value = checkpoint.read_slice(self._own_names[name], start, stop, what)
        factor_a, factor_b = factor_names(name)
        if factor_a not in checkpoint.shapes or start == stop:
            return value
        rank, width = checkpoint.shapes[factor_a]
        first, last = start // width, -(-stop // width)  # rows of the weight, (out, in)
        a = checkpoint.read_slice(factor_a, 0, rank * width, what).view(rank, width)
        b = checkpoint.read_slice(factor_b, first * rank, last * rank, what).view(last - first, rank)
        change = torch.mm(b, a).flatten()[start - first * width : stop - first * width]
        return value.add_(change, alpha=self._scale)


def merged(checkpoint: ZeroCheckpoint) -> "ZeroCheckpoint | MergedCheckpoint":
    """The checkpoint as of the model without adapters; itself where it has none. Raises CheckpointError where
    nothing says by what its adapters are scaled."""
    return MergedCheckpoint(checkpoint) if any(map(is_factor, checkpoint.shapes)) else checkpoint


def lora_settings(checkpoint: ZeroCheckpoint) -> dict[str, Any]:
    """`engine.tune.lora` of the run, as its save notes it: rank, alpha, dropout, targets. Raises CheckpointError
    where there is no such note."""
    settings: Any = (checkpoint.manifest.get("meta") or {}).get("tune")
    lora: Any = settings.get("lora") if isinstance(settings, dict) else None
    rank, alpha = (lora.get("rank"), lora.get("alpha")) if isinstance(lora, dict) else (None, None)
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise CheckpointError(
            f"{checkpoint.path} has no note that says rank and alpha of low-rank adapters, so they can neither be "
            "merged nor exported; copy the checkpoint again, with all its files"
        )
    return lora


def _scale_of(checkpoint: ZeroCheckpoint) -> float:
    lora = lora_settings(checkpoint)
    return lora["alpha"] / lora["rank"]
