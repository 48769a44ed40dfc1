"""The least that DeepSpeed needs around a segmentor: forward, backward, step. Also what the published
backbone runs in."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from mmseg.models import build_segmentor
from timing import Timed, time_steps
from torch import Tensor, nn
from workload import Workload, micro_batches, resolved_ds_config

from internseg_ds.distributed.process_group import world_from_environment


def run(workload: Workload, work_dir: Path) -> Timed:
    from internseg_ds.optimization.parameter_groups import parameter_groups

    cfg = workload.experiment
    return loop(workload, our_segmentor(workload), lambda model: parameter_groups(model, cfg.optimizer))


def our_segmentor(workload: Workload) -> nn.Module:
    """Built whole, as a user without our engine would; in bf16 with our heads in fp32, else it could not
    run."""
    import internseg_ds.models  # noqa: F401  which registers ours
    from internseg_ds.distributed.initial_values import initialise
    from internseg_ds.distributed.precision import apply_precision

    world = world_from_environment()
    dtype = torch.bfloat16 if workload.ds_config.get("bf16", {}).get("enabled") else torch.float32
    with world.device:
        model = build_segmentor(workload.experiment.model).to(dtype)
    initialise(model, 0, dtype) if workload.weights is None else model.load_state_dict(
        torch.load(workload.weights)["state_dict"]
    )
    apply_precision(model, dtype if world.device.type == "cuda" else torch.float32)
    return model


def loop(workload: Workload, model: nn.Module, groups_of: Any) -> Timed:
    """groups_of(model): its parameter groups."""
    cfg, world = workload.experiment, world_from_environment()
    raw = resolved_ds_config(workload, cfg, world.size)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(groups_of(model), cfg.optimizer, world.device), config=raw
    )
    batches = micro_batches(workload, world.rank, world.size, world.device)

    def step() -> Tensor:
        terms = engine(return_loss=True, **next(batches))
        loss = sum(value for name, value in terms.items() if "loss" in name)
        engine.backward(loss)
        engine.step()
        return loss

    engine.train()
    return time_steps(step, workload.warmup, workload.steps, world.device)


def adamw(groups: list[dict[str, Any]], section: dict[str, Any], device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW, its fused kernel on a GPU: the optimizer that our engine builds."""
    return torch.optim.AdamW(
        groups,
        lr=section["lr"],
        betas=tuple(section["betas"]),
        weight_decay=section["weight_decay"],
        fused=device.type == "cuda",
    )
