"""DeepSpeed's engine around the segmentor of an experiment: built, given its weights, precision and
optimizer.

In: an experiment, its ds_config and its model on the meta device. Out: what `deepspeed.initialize` returns,
ready to train.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from internseg_ds.config.ds_config import DsConfig
from internseg_ds.config.experiment import Experiment
from internseg_ds.distributed.block_hooks import compile_under_hooks, require_input_gradients
from internseg_ds.distributed.construction import (
    build_for_training,
    freeze_parts,
    set_activation_checkpointing,
    tune_for_training,
)
from internseg_ds.distributed.precision import ComputeDtypes, apply_precision
from internseg_ds.distributed.threads import take_share_of_cores
from internseg_ds.distributed.zero_internals import gather_frozen_where_used
from internseg_ds.models.block_execution.float8_linear import multiply_in_float8
from internseg_ds.models.repeated_blocks import block_names
from internseg_ds.optimization.muon import Muon
from internseg_ds.optimization.optimizers import build_optimizer, scheduled
from internseg_ds.optimization.parameter_groups import groups_in, parameter_groups
from internseg_ds.optimization.ranged_adam import RangedAdam, divide_by_settings


def build_deepspeed_engine(
    experiment: Experiment,
    ds: DsConfig,
    meta_model: nn.Module,
    device: torch.device,
    *,
    seed: int,
    dtypes: ComputeDtypes,
    recomputation: str | int,
    load_weights: Callable[[nn.Module], None] = lambda _: None,
) -> Any:
    """The DeepSpeedEngine of a run. Collective.

    meta_model: the experiment's segmentor on the meta device, after `choose_trained`: parameter groups are
    made on it, since ZeRO-3 hides shapes. seed: of the initial values. load_weights: is given the segmentor
    after its initial values and before its optimizer.
    """
    import deepspeed

    model = build_for_training(experiment.model, ds, device, seed)
    set_activation_checkpointing(model, recomputation)
    tune_for_training(model, experiment.engine.tune, meta_model, ds, seed)
    freeze_parts(model, experiment.engine.freeze)
    load_weights(model)
    apply_precision(model, dtypes.backbone, heads=dtypes.heads, autocast=ds.precision == "autocast")
    names = block_names(meta_model.get_submodule("backbone"))
    if experiment.engine.matmul_dtype == "float8":
        multiply_in_float8(model.get_submodule("backbone"), names)
    groups = groups_in(model, parameter_groups(meta_model, experiment.optimizer), meta_model)
    if ds.cpu_adam:
        take_share_of_cores()
    optimizer = build_optimizer(groups, experiment.optimizer, ds, compiled=experiment.engine.compile)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=ds.raw,
        lr_scheduler=lambda optimizer: experiment.schedule.scheduler(scheduled(optimizer)),
    )
    require_input_gradients(engine.module)
    if experiment.engine.compile:
        compile_under_hooks(engine.module.get_submodule("backbone"), names, partitioned=ds.stage == 3)
    gather_frozen_where_used(engine)
    if isinstance(optimizer, RangedAdam):
        divide_by_settings(engine, optimizer, groups)
    if isinstance(optimizer, Muon):
        optimizer.find_matrices(engine, groups)
    return engine


def loss_terms(deepspeed_engine: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loss terms and accuracies of a micro-batch, as scalars; "loss" is the sum of the terms whose names
    hold "loss", as in mmseg.

    inputs: what the segmentor's `forward_train` takes.
    """
    terms = {
        name: value.mean() if isinstance(value, Tensor) else sum(item.mean() for item in value)
        for name, value in deepspeed_engine(return_loss=True, **inputs).items()
    }
    terms["loss"] = sum(value for name, value in terms.items() if "loss" in name)
    return terms
