"""Resuming from a ZeRO checkpoint of any stage and any number of processes: each rank reads its own slices of
the files, without talking to another.

In: an initialised DeepSpeed engine whose module holds the checkpoint's weights (`weight_loading.load`), and
the checkpoint. Out: the same engine with the checkpoint's fp32 master weights, moments of the optimizer, step
counts and schedule, as if it had trained until there itself. DeepSpeed's own loading needs the same stage and
number of processes; its universal checkpoints (0.19.8) need a converted copy on disk and give every group the
first group's learning rate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from internseg_ds.checkpoints.zero_checkpoint import What, ZeroCheckpoint
from internseg_ds.config.lr_schedule import LrSchedule
from internseg_ds.distributed.zero_internals import (
    Fragment,
    fp32_partitions,
    fragment_of,
    inner_optimizer,
    set_step_counters,
    step_count_in_state,
)
from internseg_ds.optimization.compact_adam import CompactAdam
from internseg_ds.progress import BYTES, Count, progress
from internseg_ds.torch_internals import set_schedule_position

FP32_BYTES = 4
"""Of an element of what is read."""


@torch.no_grad()
def restore(engine: Any, checkpoint: ZeroCheckpoint, schedule: LrSchedule) -> None:
    """Gives the engine's optimizer and schedule the state of `checkpoint`.

    schedule: as the config defines it now. Raises CheckpointError where the checkpoint lacks part of the
    state, or is damaged where this rank reads.
    """
    partitions, optimizer = fp32_partitions(engine), inner_optimizer(engine)
    fragments = {
        name: fragment
        for name, param in engine.module.named_parameters()
        if (fragment := fragment_of(engine, param)) is not None
    }
    # Muon keeps other moments of matrices than of all else, and those lie in different partitions
    kept = {each.partition: checkpoint.moments_of(name) for name, each in fragments.items()}
    if checkpoint.moments or checkpoint.counts:
        for number, partition in enumerate(partitions):
            moments = kept.get(number, checkpoint.moments)
            optimizer.state[partition] = _empty_state(optimizer, partition, checkpoint, moments)
    total = sum(
        FP32_BYTES * (each.stop - each.start) * (1 + len(kept[each.partition])) for each in fragments.values()
    )
    with progress("loading the optimizer's state", total, BYTES) as done:
        for number, partition in enumerate(partitions):
            held = {name: each for name, each in fragments.items() if each.partition == number}
            _read_into(partition.data, held, checkpoint, "fp32", done)
            for what in kept.get(number, ()):
                if isinstance(optimizer, CompactAdam):
                    whole = torch.zeros(partition.numel())
                    _read_into(whole, held, checkpoint, what, done)
                    optimizer.set_moment(partition, what, whole)
                else:
                    _read_into(optimizer.state[partition][what], held, checkpoint, what, done)
    set_step_counters(engine, steps=checkpoint.steps, skipped=checkpoint.steps - checkpoint.scheduled)
    scheduler = engine.lr_scheduler
    rates = [schedule.lr(checkpoint.scheduled, base) for base in scheduler.base_lrs]
    set_schedule_position(scheduler, checkpoint.scheduled, rates)


def _empty_state(
    optimizer: torch.optim.Optimizer, partition: Tensor, checkpoint: ZeroCheckpoint, moments: Sequence[str]
) -> dict[str, Any]:
    """The optimizer's state of one flat tensor when the checkpoint was saved, with moments of zeros."""
    state: dict[str, Any] = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in checkpoint.counts.items()
    }
    if "step" in state:
        state["step"] = step_count_in_state(optimizer, checkpoint.updates, partition.device)
    if isinstance(optimizer, CompactAdam):
        return state | (optimizer.empty_moments(partition) if moments else {})
    return state | {what: torch.zeros_like(partition.data) for what in moments}


def _read_into(
    target: Tensor, fragments: Mapping[str, Fragment], checkpoint: ZeroCheckpoint, what: What, done: Count
) -> None:
    """target: a flat tensor of the size of a partition, of any floating dtype. fragments: by the names of the
    parameters, what the partition holds of them. done: counts the bytes."""
    for name, fragment in fragments.items():
        target[fragment.in_partition] = checkpoint.read_slice(name, fragment.start, fragment.stop, what)
        done.advance(FP32_BYTES * (fragment.stop - fragment.start))
