"""Whether the settings of a run can work together: ds_config, precision, offloading, optimizer, trackers."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internseg_ds.config.ds_config import DsConfig
from internseg_ds.config.experiment import Experiment
from internseg_ds.distributed.batch_norms import norms_of_each_rank
from internseg_ds.distributed.precision import check_float8, compute_dtypes
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import ConfigError, counted, shortened
from internseg_ds.monitoring.trackers.opening import check_trackers
from internseg_ds.optimization.optimizers import check_optimizer
from internseg_ds.optimization.parameter_groups import (
    default_weight_decay,
    parameter_groups,
    unmatched_custom_keys,
)
from internseg_ds.planning.estimator import ds_config_of
from internseg_ds.preflight.model_checks import check_patches, check_windows


def check_settings(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    model: nn.Module,
    world: World,
    resume_from: Path | None,
) -> DsConfig:
    """The ds_config, filled in from the experiment and checked against it. model: on the meta device.

    Raises ConfigError for what cannot work together.
    """
    ds = ds_config_of(
        experiment,
        ds_config,
        model,
        world.size,
        global_batch=experiment.engine.global_batch,
        accumulation=experiment.gradient.accumulation,
    )
    if ds.stage == 0:
        raise ConfigError(
            f'{ds.source} names no ZeRO stage; write "zero_optimization": {{"stage": 3}} (or 1, 2), or '
            "take one of ds_configs/"
        )
    dtypes = compute_dtypes(experiment.engine, model, world.device, ds.precision)
    check_float8(experiment.engine, model, dtypes, world.device, ds.precision)
    check_offload(experiment, ds, resume_from)
    check_node_local(ds, world)
    parameter_groups(model, experiment.optimizer)
    check_optimizer(experiment.optimizer, ds)
    check_windows(experiment)
    check_patches(experiment, model)
    if world.is_main:
        check_trackers(experiment.logging.hooks)
    return ds


def settings_notes(experiment: Experiment, ds: DsConfig, model: nn.Module) -> list[str]:
    """What the log should say of settings that work, but perhaps not as they were meant."""
    notes = unmatched_custom_keys(model, experiment.optimizer)
    if "weight_decay" not in experiment.optimizer:
        decay = default_weight_decay(experiment.optimizer)
        notes.append(f"optimizer.weight_decay is not set: it is {decay:g}, the optimizer's own default")
    frozen = sum(param.numel() for param in model.parameters() if not param.requires_grad)
    if frozen and ds.param_dtype == torch.bfloat16:
        notes.append(
            f"{frozen:,} parameters are frozen: they are kept and saved in bf16, in which the model computes "
            f"with them{'' if ds.bf16_master else '; only what trains has fp32 master weights'}"
        )
    if experiment.engine.matmul_dtype == "float8" and not experiment.engine.compile:
        notes.append(
            "engine.matmul_dtype='float8' without engine.compile=True: converting the operands may take longer than "
            "their products save (docs/performance.md)"
        )
    norms = norms_of_each_rank(model)
    if norms and ds.world_size > 1:
        notes.append(
            f"{counted(len(norms), 'batch norm')} normalise over the {counted(ds.micro_batch, 'image')} of one "
            "process, and have the mean of all processes' running statistics; norm_cfg=dict(type='SyncBN') "
            "normalises over the images of all"
        )
    return [*notes, *_unused_notes(experiment, model)]


def _unused_notes(experiment: Experiment, model: Any) -> Iterator[str]:
    """Which parameters of another library's model are not there, or do not train, though all should."""
    if left_out := getattr(model.backbone, "left_out", ()):
        yield (
            f"{counted(len(left_out), 'parameter')} of the backbone's library that no feature map depends on: "
            f"not built ({shortened(list(left_out))})"
        )
        still = [name for name, param in model.backbone.named_parameters() if not param.requires_grad]
        if still and experiment.engine.tune == "all" and not model.backbone.freeze:
            yield f"no gradient reaches {shortened(still)} of the backbone, which stays as it is"


def check_offload(experiment: Experiment, ds: DsConfig, resume_from: Path | None) -> None:
    """Averages and resumed runs read and write the optimizer's state in memory; on NVMe it is not there."""
    zero = ds.raw["zero_optimization"]
    on_nvme = [
        key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device") == "nvme"
    ]
    if on_nvme and (resume_from is not None or experiment.engine.ema is not None):
        what = "engine.ema" if resume_from is None else "--resume"
        raise ConfigError(
            f'{what} cannot work with {on_nvme[0]}.device="nvme" of {ds.source}; offload to "cpu"'
        )


def check_node_local(ds: DsConfig, world: World) -> None:
    """DeepSpeed names node-local files by LOCAL_RANK, which must be the number of the GPU too: where each
    process sees a GPU 0 alone, it cannot be."""
    if (
        (ds.raw.get("checkpoint") or {}).get("use_node_local_storage")
        and world.device.type == "cuda"
        and world.device.index != world.local_rank
    ):
        raise ConfigError(
            f"checkpoint.use_node_local_storage of {ds.source} cannot work where srun shows each process "
            "one GPU alone: "
            "start with --gpus-per-node in place of --gpus-per-task, or add --gpu-bind=none"
        )
