"""A run taken up from a ZeRO checkpoint of any stage and any number of processes: each rank reads its own slice of it, and talks to no other.

In: an initialised DeepSpeed engine whose module holds the checkpoint's weights (`loading.load`), and the checkpoint. Out: the same engine with the
checkpoint's fp32 masters, AdamW moments, step counts and schedule, as if it had trained until there itself. DeepSpeed's own loading wants the same stage
and number of processes; its universal checkpoints (0.19.8) need a converted copy on disk and give every group the first group's learning rate.
"""

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from internseg_ds.checkpoints.zero_checkpoint import What, ZeroCheckpoint
from internseg_ds.distributed.lr_schedule import LrSchedule
from internseg_ds.distributed.partitions import partitions, place_of

MOMENTS: tuple[What, ...] = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def restore(engine: Any, checkpoint: ZeroCheckpoint, schedule: LrSchedule) -> None:
    """Gives the engine's optimizer and schedule the state of `checkpoint`. Raises CheckpointError where the checkpoint lacks part
    of it, or is damaged where this rank reads."""
    masters, inner = partitions(engine), engine.optimizer.optimizer
    if checkpoint.updates:
        for master in masters:
            inner.state[master] = {
                "step": _step(inner, checkpoint.updates, master),
                **{what: torch.zeros_like(master.data) for what in MOMENTS},
            }
    for name, param in engine.module.named_parameters():
        place = place_of(engine, param)
        if place is None:
            continue
        master = masters[place.partition]
        targets = {"fp32": master.data} | (
            {what: inner.state[master][what] for what in MOMENTS} if checkpoint.updates else {}
        )
        for what, target in targets.items():
            target[place.held] = checkpoint.read_slice(name, place.start, place.stop, what)
    engine.global_steps, engine.skipped_steps = checkpoint.steps, checkpoint.steps - checkpoint.scheduled
    engine.global_samples = checkpoint.steps * engine.train_batch_size()
    engine.micro_steps = checkpoint.steps * engine.gradient_accumulation_steps()
    _wind_forward(engine.lr_scheduler, schedule, checkpoint.scheduled)


def _step(inner: torch.optim.Optimizer, updates: int, master: Tensor) -> int | Tensor:
    """AdamW's step count, where the optimizer's kernel wants it."""
    if isinstance(inner, DeepSpeedCPUAdam):
        return updates
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    return torch.tensor(float(updates), device=master.device if on_device else "cpu")


def _wind_forward(scheduler: Any, schedule: LrSchedule, updates: int) -> None:
    """The learning rates that follow `updates` updates, by the schedule that the config names now."""
    groups = scheduler.optimizer.param_groups
    for group, base in zip(groups, scheduler.base_lrs, strict=True):
        group["lr"] = schedule.lr(updates, base)
    scheduler.last_epoch, scheduler._step_count = updates, updates + 1
    scheduler._last_lr = [group["lr"] for group in groups]
