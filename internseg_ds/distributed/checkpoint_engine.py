"""How DeepSpeed writes the files of a checkpoint: a write that fails is noted, not raised, and on request the training goes on meanwhile.

DeepSpeed's save_checkpoint holds barriers between the files of a rank. A rank that raised in there would leave the others waiting, and a full disk
would end the training instead of the save. (DeepSpeed's own decoupled writer, 0.19.8, needs libaio and says nothing of a write that failed.)
"""

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils._pytree import tree_map

from internseg_ds.checkpoints.checksums import SummedFile, Written

log = logging.getLogger(__name__)


class NotingCheckpointEngine(TorchCheckpointEngine):
    """Attributes: failure (the first on this rank since `forget`), written (name of a file -> what was written into it, with its checksums).

    background: `save` copies what it is given to host memory and returns; a thread writes the copy. Host memory holds this rank's files once more then.
    """

    def __init__(self, config: Any, *, background: bool = False) -> None:
        super().__init__(config)
        self.background, self.failure = background, None
        self.written: dict[str, Written] = {}
        self._thread, self._pending = ThreadPoolExecutor(1), []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok)
        except OSError as error:
            self.failure = self.failure or error

    def save(self, state_dict: Any, path: str) -> None:
        if self.background:
            copies: dict[tuple, torch.Tensor] = {}  # two names of one tensor stay one tensor

            def copied(value: Any) -> Any:
                if not isinstance(value, torch.Tensor):
                    return value
                place = (value.data_ptr(), value.dtype, value.shape, value.stride())
                if value.numel() == 0 or place not in copies:
                    copies[place] = value.detach().to("cpu", copy=True)
                return copies[place]

            self._pending.append(self._thread.submit(self._write, tree_map(copied, state_dict), path))
        else:
            self._write(state_dict, path)

    def _write(self, state_dict: Any, path: str) -> None:
        try:
            file = SummedFile(path)
            try:
                super().save(state_dict, file)
                if file.failure is not None:
                    raise file.failure
                file.to_disk()  # here, where the training need not wait for it
            finally:
                self.written[os.path.basename(path)] = file.close()
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            self.failure = self.failure or error

    def forget(self) -> None:
        """Before the files of the next checkpoint."""
        self.wait()
        self.failure, self.written = None, {}

    def done(self) -> bool:
        """Whether nothing is left to be written."""
        return all(write.done() for write in self._pending)

    def wait(self) -> Exception | None:
        """Waits for what is being written; the first thing that went wrong on this rank since `forget`."""
        pending: list[Future] = self._pending
        self._pending = []
        for write in pending:
            write.result()
        return self.failure


class _SavingEngine(DeepSpeedEngine):
    """DeepSpeed's engine, whose copies of its recovery scripts beside the checkpoints are worth a warning, and no rank's end, where there is no room."""

    def _copy_recovery_script(self, save_path: str) -> None:
        try:
            super()._copy_recovery_script(save_path)
        except OSError as error:
            log.warning(
                "DeepSpeed's scripts zero_to_fp32.py and zero_to_torch.py cannot be copied into %s: %s",
                save_path,
                error.strerror or error,
            )


def note_failed_writes(engine: DeepSpeedEngine, *, background: bool = False) -> None:
    """Has the saves of an engine go on where a write fails, and note it in its `checkpoint_engine`. background: as of `NotingCheckpointEngine`."""
    engine.checkpoint_engine = NotingCheckpointEngine(engine._config, background=background)
    engine.__class__ = _SavingEngine  # deepspeed.initialize makes its own class alone
