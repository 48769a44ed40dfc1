"""How DeepSpeed writes the files of a checkpoint here: a failed write is recorded instead of raised, and on
request files are written in the background.

DeepSpeed's save_checkpoint has barriers between the files of a rank. A rank that raised there would leave the
others waiting, and a full disk would end the training instead of only the save. (DeepSpeed's own decoupled
writer, as of 0.19.8, needs libaio and does not report a failed write.)
"""

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from internseg_ds.checkpoints.checksums import SummedFile, Written
from internseg_ds.distributed.zero_internals import catch_recovery_script_errors, replace_checkpoint_engine
from internseg_ds.torch_internals import tree_map

log = logging.getLogger(__name__)


class NotingCheckpointEngine(TorchCheckpointEngine):
    """Writes files with their checksums, and records what fails.

    Attributes: failure (the first error on this rank since `forget`, or None), written (file name -> what was
    written into it, with its checksums).
    """

    def __init__(self, config: Any, *, background: bool = False) -> None:
        """config: of the DeepSpeed engine. background: `save` copies its argument to host memory and returns,
        and a thread writes the copy; meanwhile host memory holds this rank's files once more."""
        super().__init__(config)
        self.background = background
        self.failure: Exception | None = None
        self.written: dict[str, Written] = {}
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok)
        except OSError as error:
            self._record(error)

    def save(self, state_dict: Any, path: str) -> None:
        state_dict = _frozen_once(state_dict)
        if self.background:
            self._pending.append(self._thread.submit(self._write, _copy_to_host(state_dict), path))
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
            self._record(error)

    def _record(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error

    def forget(self) -> None:
        """Waits for pending writes and clears `failure` and `written`, before the next checkpoint."""
        self.wait()
        self.failure = None
        self.written = {}

    def done(self) -> bool:
        """Whether no write is pending."""
        return all(write.done() for write in self._pending)

    def wait(self) -> Exception | None:
        """Waits for pending writes; returns the first error on this rank since `forget`."""
        pending = self._pending
        self._pending = []
        for write in pending:
            write.result()
        return self.failure


def _frozen_once(state: Any) -> Any:
    """The content of a file in which frozen weights are in memory once. Under ZeRO-2 DeepSpeed gives them twice, on
    GPUs as two copies: in the module's weights, and as "frozen_param_fragments" (runtime/engine.py,
    `_common_checkpoint_state`)."""
    fragments, module = (state.get(key) for key in ("frozen_param_fragments", "module"))
    if not fragments or not module:
        return state
    once = {
        # under ZeRO-3 the module's are empty
        name: whole if (whole := module.get(name)) is not None and whole.shape == fragment.shape else fragment
        for name, fragment in fragments.items()
    }
    return {**state, "frozen_param_fragments": once}


def _copy_to_host(state: Any) -> Any:
    """`state` (nested dicts, lists and tuples) with copies of its tensors in host memory. Tensors that are
    one in memory, under two names, stay one: so they are one in the file."""
    copies: dict[tuple, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() == 0 or key not in copies:  # all empty tensors have the address 0
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map(copied, state)


def note_failed_writes(engine: DeepSpeedEngine, *, background: bool = False) -> None:
    """Makes `engine.save_checkpoint` go on where a write fails, and record it in a `NotingCheckpointEngine`.

    background: as there. DeepSpeed's recovery scripts, which it copies beside the checkpoint itself, are
    worth a warning only.
    """
    replace_checkpoint_engine(engine, lambda config: NotingCheckpointEngine(config, background=background))
    catch_recovery_script_errors(engine, _warn_of_missing_scripts)


def _warn_of_missing_scripts(folder: str, error: OSError) -> None:
    log.warning(
        "DeepSpeed's scripts zero_to_fp32.py and zero_to_torch.py cannot be copied into %s: %s",
        folder,
        error.strerror or error,
    )
