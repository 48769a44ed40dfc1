"""How DeepSpeed writes the files of a checkpoint: as always, but a write that fails is noted, not raised.

DeepSpeed's save_checkpoint holds barriers between the files of a rank. A rank that raised in there would leave the others waiting, and a full disk
would end the training instead of the save.
"""

from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine


class NotingCheckpointEngine(TorchCheckpointEngine):
    """`failure`: what the first failed write since `forget` raised on this rank, or None."""

    failure: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            self.failure = self.failure or error

    def forget(self) -> None:
        self.failure = None
