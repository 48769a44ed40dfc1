"""Saving and finding checkpoints of a run.

    WORK_DIR/checkpoints/iter_N/           one ZeRO checkpoint: a file per rank, and internseg_ds.json, written last
    WORK_DIR/checkpoints/latest            the name of the newest complete one
    WORK_DIR/checkpoints/best              the name of the one with the best score

A checkpoint is written under a temporary name, brought to disk, renamed, and only then named in `latest`: whatever is interrupted leaves the previous
one usable. DeepSpeed writes and reads the files; this module owns names, order and retention.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from internseg_ds.checkpoints.manifest import MANIFEST, read_manifest, update_metrics, verify_manifest, write_manifest
from internseg_ds.checkpoints.zero_checkpoint import find_save
from internseg_ds.engine.state import TrainState
from internseg_ds.errors import CheckpointError

log = logging.getLogger(__name__)

PARTIAL = ".partial"


class Checkpoints:
    """The checkpoints folder of one run. Every method is collective: all ranks call it, with the same arguments."""

    def __init__(self, folder: Path, keep: int) -> None:
        """keep: how many of the newest stay (`max_keep_ckpts`); 0 or less keeps all. The best one stays beside them."""
        self.folder, self.keep = folder, keep

    def save(self, deepspeed_engine: Any, state: TrainState, meta: dict[str, Any]) -> Path:
        """Writes weights, optimizer, schedule and `state`; returns the checkpoint's directory. meta: CLASSES, PALETTE, config text."""
        tag = f"iter_{state.step}"
        partial, final = self.folder / (tag + PARTIAL), self.folder / tag
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*" + PARTIAL):
                shutil.rmtree(leftover)
        deepspeed_engine.save_checkpoint(str(self.folder), tag=partial.name, client_state={"internseg_ds": state.state_dict()}, save_latest=False)
        if dist.get_rank() == 0:
            for file in partial.rglob("*"):
                _to_disk(file)
            write_manifest(partial, step=state.step, world_size=dist.get_world_size(), zero_stage=deepspeed_engine.zero_optimization_stage(), meta=meta, metrics={})
            replaced = self.folder / (tag + ".replaced" + PARTIAL)
            if final.exists():
                final.rename(replaced)  # a resumed run comes to this step again
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            _to_disk(self.folder)
            publish(self.folder / "latest", tag)
            self._retain()
        dist.barrier()
        log.info("saved %s", final)
        return final

    def score(self, state: TrainState, metrics: dict[str, float], best_by: str | None) -> bool:
        """Notes the evaluation of the checkpoint of `state.step`, and marks it when it is the best so far by the score `best_by`; whether it is."""
        tag = f"iter_{state.step}"
        better = best_by is not None and (state.best is None or metrics[best_by] > state.best)
        if better:
            state.best, state.best_tag = metrics[best_by], tag
        if dist.get_rank() == 0 and (self.folder / tag / MANIFEST).exists():
            update_metrics(self.folder / tag, metrics)
            if better:
                publish(self.folder / "best", tag)
                self._retain()
        dist.barrier()
        return better

    def recall_best(self, state: TrainState, best_by: str | None) -> None:
        """Takes the best score so far from the folder: a checkpoint is saved before it is scored, so its own state does not know."""
        tag = self._best_tag()
        if tag and (manifest := read_manifest(self.folder / tag)) and manifest["step"] <= state.step:
            state.best, state.best_tag = manifest["metrics"].get(best_by), tag

    def _best_tag(self) -> str | None:
        pointer = self.folder / "best"
        return pointer.read_text() if pointer.is_file() else None

    def _retain(self) -> None:
        """Newest by the time of the save, not by step: the folder may hold later steps of an earlier run."""
        if self.keep <= 0:
            return
        saves = sorted((note.parent for note in self.folder.glob(f"iter_*/{MANIFEST}")), key=lambda path: read_manifest(path).get("saved_at", 0))
        for path in saves[: -self.keep]:
            if path.name != self._best_tag():
                log.info("removing %s (max_keep_ckpts = %d)", path, self.keep)
                shutil.rmtree(path)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint directory that `path` means: one itself, or a folder (WORK_DIR, WORK_DIR/checkpoints) whose `latest` names it.

    Raises CheckpointError when there is none, or when it was not finished.
    """
    path = find_save(Path(path))
    if read_manifest(path) is None:
        raise CheckpointError(f"{path} holds no {MANIFEST}: it is no checkpoint of this engine, or its save did not finish; take another one")
    verify_manifest(path)
    return path


def checkpoint_to_resume(resume: str | os.PathLike | None, work_dir: Path) -> Path | None:
    """The checkpoint directory that --resume means: None, "auto" (the newest of `work_dir`, if there is any), or a path."""
    if resume == "auto":
        resume = work_dir if (work_dir / "checkpoints" / "latest").exists() else None
    return find_checkpoint(resume) if resume is not None else None


def check_resumable(path: Path, world_size: int, stage: int) -> None:
    """Raises CheckpointError when the checkpoint was saved by another number of processes or under another ZeRO stage than the run that is to go on."""
    manifest = read_manifest(path)
    if (manifest["world_size"], manifest["zero_stage"]) != (world_size, stage):
        raise CheckpointError(f"{path} was saved by {manifest['world_size']} processes under ZeRO-{manifest['zero_stage']}, this run has {world_size} under "
                              f"ZeRO-{stage}; resume with the same, or start anew from its weights with --load-from")


def load_checkpoint(deepspeed_engine: Any, path: Path, state: TrainState) -> None:
    """Fills the engine and `state` from a checkpoint directory that `check_resumable` has passed. Collective."""
    loaded, client_state = deepspeed_engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {path}")
    state.load_state_dict(client_state["internseg_ds"])


def publish(pointer: Path, tag: str) -> None:
    """Makes the pointer file name `tag`, at once or not at all."""
    temporary = pointer.with_suffix(".new")
    temporary.write_text(tag)
    _to_disk(temporary)
    os.replace(temporary, pointer)
    _to_disk(pointer.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
