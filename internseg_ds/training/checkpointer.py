"""Saving checkpoints of a run, and keeping some.

    WORK_DIR/checkpoints/iter_N/           one ZeRO checkpoint: a file per rank, and internseg_ds.json, written last
    WORK_DIR/checkpoints/latest            the name of the newest complete one
    WORK_DIR/checkpoints/best              the name of the one with the best score

A checkpoint is written under a temporary name, at once or in the background, brought to disk, renamed, and
only then named in `latest`: whatever is interrupted leaves the previous one usable. DeepSpeed writes and
reads the files; this module owns names, order and retention.

Where hosts have folders of their own (node-local storage), each holds all of this for the files of its own
ranks: a save is published on every host or on none.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from internseg_ds.checkpoints.checksums import Written
from internseg_ds.checkpoints.manifest import SaveRecord, update_metrics, write_manifest
from internseg_ds.checkpoints.saves import (
    PARTIAL,
    all_to_disk,
    give_name_back,
    noted_saves,
    pointed_to,
    publish,
    remove,
    sweep,
    take_name,
    to_disk,
)
from internseg_ds.checkpoints.zero_files import EMA_FILE
from internseg_ds.distributed.process_group import any_rank, gather_from_ranks
from internseg_ds.distributed.zero_internals import checkpoint_engine_of, fp32_partitions, inner_optimizer
from internseg_ds.output_files import unless_disk_full
from internseg_ds.planning.zero_settings import saved_elements
from internseg_ds.progress import stage
from internseg_ds.training.train_state import TrainState

if TYPE_CHECKING:
    from internseg_ds.optimization.ema import ShardedEma

log = logging.getLogger(__name__)

FILES_OF_A_RANK = 4
"""At most, with the folder and the manifest of a save."""


@dataclass(frozen=True)
class Started:
    """A save whose files are being written. needed: bytes in this folder; note: what the manifest will
    say."""

    engine: Any
    tag: str
    needed: int
    note: SaveRecord


class Checkpointer:
    """The checkpoints folder of one run. Every method is collective: all ranks call it, with the same
    arguments."""

    def __init__(self, folder: Path, keep: int, leaders: Sequence[int] | None = None) -> None:
        """keep: how many of the newest stay (`max_keep_ckpts`); 0 or less keeps all. The best one stays
        beside them. leaders: for each rank, the one that looks after its folder (`find_leaders`); rank 0
        after all by default."""
        self.folder, self.keep = folder, keep
        self.leaders = list(leaders or [0] * dist.get_world_size())
        self.leads = self.leaders[dist.get_rank()] == dist.get_rank()
        self.newest: str | None = None
        """Tag of the newest save of this run that succeeded."""
        self._started: Started | None = None

    def save(
        self,
        deepspeed_engine: Any,
        state: TrainState,
        meta: dict[str, Any],
        groups: Sequence[Mapping[str, Any]] = (),
        ema: "ShardedEma | None" = None,
    ) -> Path | None:
        """Writes weights, optimizer, schedule, `state` and the average `ema`; returns the checkpoint's
        directory.

        A save that fails on any rank (a full disk) is cleared away, with a warning, and returns None: it
        shall not cost the training. Where the engine's writer works in the background, this returns when the
        state is copied, and `finish` publishes it. meta: CLASSES, PALETTE, config text. groups: parameter
        groups as dicts of names, lr, weight_decay, for the check of a run that goes on from here.
        """
        self.finish()  # the save before this one
        tag, writer = f"iter_{state.step}", checkpoint_engine_of(deepspeed_engine)
        partial = self.folder / (tag + PARTIAL)
        writer.forget()
        needed = self._bytes_to_save(deepspeed_engine, ema)
        failure = _failure_of(lambda: self._make_room_for(partial, needed)) if self.leads else None
        if _agreed(deepspeed_engine, failure is None):
            with stage(f"saving {tag}, {needed / 2**30:.2f} GiB", after_s=2.0):
                deepspeed_engine.save_checkpoint(
                    str(self.folder),
                    tag=partial.name,
                    client_state={"internseg_ds": state.state_dict()},
                    save_latest=False,
                )
                if ema is not None:
                    writer.save(ema.state_dict(), str(partial / EMA_FILE.format(rank=dist.get_rank())))
        else:
            writer.failure = failure or OSError("another rank failed")
        self._started = Started(
            deepspeed_engine,
            tag,
            needed,
            SaveRecord(
                step=state.step,
                world_size=dist.get_world_size(),
                zero_stage=deepspeed_engine.zero_optimization_stage(),
                meta=meta,
                groups=groups,
                # on every host the same: it tells two saves of one step apart
                saved_at=gather_from_ranks(time.time())[0],
                node_local=len(set(self.leaders)) > 1,
                run=state.run,
                number=max(gather_from_ranks(self._last_number())) + 1,
            ),
        )
        if not writer.background:
            self.finish()
        return self.folder / tag if self._started is not None or self.newest == tag else None

    def finish(self, *, wait: bool = True) -> None:
        """Publishes the save that `save` started, if any, once every rank's files are on disk. wait: False
        leaves it be while somebody still writes."""
        started = self._started
        if started is None:
            return
        writer, final = checkpoint_engine_of(started.engine), self.folder / started.tag
        partial = final.with_name(started.tag + PARTIAL)
        if not wait and not _agreed(started.engine, writer.done()):
            return
        self._started = None
        failure = writer.wait() or _failure_of(lambda: all_to_disk(partial))
        if fine := _agreed(started.engine, failure is None):
            written = self._written(writer)
            replaced = final.with_name(f"{started.tag}.replaced{PARTIAL}")
            failure = (
                _failure_of(lambda: _named(partial, final, replaced, started.note, written))
                if self.leads
                else None
            )
            fine = _agreed(started.engine, failure is None)
            if self.leads and not fine and failure is None:
                give_name_back(final, replaced)  # on another host it could not be taken
        if not fine:
            if self.leads:
                # before what was written is taken away
                shortage = _shortage(self.folder, started.needed, FILES_OF_A_RANK * dist.get_world_size())
                shutil.rmtree(partial, ignore_errors=True)
                log.warning(
                    "%s could not be saved (%s): %s; training goes on, the newest checkpoint is %s",
                    started.tag,
                    failure or "another rank failed",
                    shortage,
                    self.newest or "none",
                )
            dist.barrier()
            return
        if self.leads:
            if os.path.lexists(replaced):
                remove(replaced)
            # --resume auto finds it all the same
            with unless_disk_full(f"{final} is saved, but `latest` does not name it"):
                to_disk(self.folder)
                publish(self.folder / "latest", started.tag)
        dist.barrier()  # published on every host, before one removes an older one
        if self.leads:
            self._retain(started.note.run)
        dist.barrier()
        self.newest = started.tag
        log.info("saved %s", final)

    def score(self, state: TrainState, metrics: dict[str, float], best_by: str | None) -> bool:
        """Notes the evaluation of the checkpoint of `state.step`, and marks it when it is the best so far by
        the score `best_by`; whether it is."""
        self.finish()
        tag = f"iter_{state.step}"
        score = math.nan if best_by is None else metrics.get(best_by, math.nan)
        so_far = -math.inf if state.best is None else state.best
        better = self.newest == tag and score > so_far  # never for NaN
        if better:
            state.best, state.best_tag = score, tag
        if self.leads and self.newest == tag:
            with unless_disk_full(f"the score of {tag} is not noted beside it"):
                update_metrics(self.folder / tag, metrics)
                if better:
                    publish(self.folder / "best", tag)
                    self._retain(state.run)
        dist.barrier()
        return better

    def tidy(self) -> None:
        """Takes away what interrupted runs have left. Before the first save."""
        if self.leads:
            sweep(self.folder)
        dist.barrier()

    def recall_best(self, state: TrainState, best_by: str | None) -> None:
        """Takes the best score so far from the folder: a checkpoint is saved before it is scored, so its own
        state does not know."""
        notes = {path.name: manifest for path, manifest in noted_saves(self.folder)}
        tag = pointed_to(self.folder, "best")
        if tag in notes and (manifest := notes[tag])["step"] <= state.step:
            state.best, state.best_tag = manifest["metrics"].get(best_by), tag
        # hosts with folders of their own must not differ
        state.best, state.best_tag = gather_from_ranks((state.best, state.best_tag))[0]

    def _make_room_for(self, partial: Path, needed: int) -> None:
        """Takes leftovers away, that of an earlier save to `partial` too, and looks for room for so many
        bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        if os.path.lexists(partial):
            raise OSError(f"the leftover {partial} cannot be removed; remove it by hand")
        if shutil.disk_usage(self.folder).free <= needed:
            raise OSError("no room")

    def _last_number(self) -> int:
        """Of the saves in this rank's folder."""
        return (
            max((manifest.get("number", 0) for _, manifest in noted_saves(self.folder)), default=0)
            if self.leads
            else 0
        )

    def _written(self, writer: Any) -> dict[str, tuple[int, Written]]:
        """What the ranks of this rank's folder have written into it, by name, and which did. Collective."""
        written = gather_from_ranks(writer.written)
        here = [rank for rank, leader in enumerate(self.leaders) if leader == self.leaders[dist.get_rank()]]
        return {name: (rank, sums) for rank in here for name, sums in written[rank].items()}

    def _bytes_to_save(self, deepspeed_engine: Any, ema: "ShardedEma | None") -> int:
        """What the files in this rank's folder will take together: master weights and the optimizer's state,
        the module's own weights, the average. Collective."""
        partitions, kept = fp32_partitions(deepspeed_engine), inner_optimizer(deepspeed_engine).state
        state = [value for part in partitions for value in kept.get(part, {}).values()]
        optimizer = sum(each.nbytes for each in (*partitions, *state) if isinstance(each, torch.Tensor))
        average = 0 if ema is None else sum(shard.nbytes for shard in ema.shards)
        written = gather_from_ranks(optimizer + average + self._bytes_of_weights(deepspeed_engine))
        here = [
            size for size, leader in zip(written, self.leaders) if leader == self.leaders[dist.get_rank()]
        ]
        return int(1.01 * sum(here)) + 2**20

    def _bytes_of_weights(self, deepspeed_engine: Any) -> int:
        """Of this rank's file of the module: with all weights, which one rank of a folder writes, or, under
        ZeRO-3, with its share of those that do not train."""
        module, stage = deepspeed_engine.module, deepspeed_engine.zero_optimization_stage()
        weights = next(module.parameters()).itemsize * saved_elements(module, stage)
        buffers = sum(buffer.nbytes for buffer in module.buffers())
        if stage == 3:
            return weights // dist.get_world_size() + buffers
        return weights + buffers if self.leads else 0

    def _retain(self, run: str) -> None:
        """The newest of `run` stay, and what `latest` and `best` name; saves of other runs are not this one's
        to remove."""
        if self.keep <= 0:
            return
        own = [path for path, manifest in noted_saves(self.folder) if manifest.get("run", "") == run]
        named = {pointed_to(self.folder, "latest"), pointed_to(self.folder, "best")}
        for path in own[: -self.keep]:
            if path.name not in named:
                log.info("removing %s (max_keep_ckpts = %d)", path, self.keep)
                remove(path)


def _agreed(deepspeed_engine: Any, fine: bool) -> bool:
    """Whether it is fine on every rank. Collective."""
    (trouble,) = any_rank([not fine], deepspeed_engine.device)
    return not trouble


def _failure_of(act: Callable[[], None]) -> OSError | None:
    """What goes wrong with the disk while it acts: one rank alone must not raise where the others wait for
    it."""
    try:
        act()
    except OSError as error:
        return error
    return None


def _named(
    partial: Path, final: Path, replaced: Path, note: SaveRecord, written: Mapping[str, tuple[int, Written]]
) -> None:
    """Writes the manifest of a save that is on disk, and gives the save its name."""
    write_manifest(partial, note, written)
    take_name(partial, final, replaced)


def _shortage(folder: Path, needed: int, files: int) -> str:
    """What is short on the disk of `folder` for a save of `needed` bytes in so many files, as a part of a
    message: space, inodes, or neither."""
    try:
        free, disk = shutil.disk_usage(folder).free, os.statvfs(folder)
    except OSError as error:
        return f"nothing can be told of the disk of {folder} ({error.strerror})"
    mib = f"it needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free in {folder}"
    if free <= needed:
        return mib
    # a file system without a limit has 0 in all
    if disk.f_files > 0 and disk.f_favail < files:
        return f"it needs up to {files} files and {folder} has inodes for {disk.f_favail} (df -i)"
    return f"not for want of space: {mib}"
