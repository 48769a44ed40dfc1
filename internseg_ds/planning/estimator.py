"""An experiment on paper: its model on the meta device, and what `planning` finds out about it, each once,
for any ds_config, cluster and device.

In: an experiment. Out: the memory of a process under a ds_config, and what `estimate` needs for the time of a
step. Takes no accelerator and reads no data.
"""

import copy
import os
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import torch
from mmseg.models.segmentors import BaseSegmentor
from torch import nn

from internseg_ds.config.ds_config import BackboneSizes, DsConfig, Precision, resolve_ds_config
from internseg_ds.config.ds_config_batch import BatchPerStep
from internseg_ds.config.experiment import Experiment
from internseg_ds.distributed.construction import build_on_meta, choose_trained, set_activation_checkpointing
from internseg_ds.distributed.gathering import WINDOWS_PER_FORWARD
from internseg_ds.distributed.precision import apply_precision, heads_dtype
from internseg_ds.errors import ConfigError
from internseg_ds.models.activation_checkpointing import CheckpointingPolicy
from internseg_ds.models.backbone import patch_size, vector_length
from internseg_ds.models.block_execution.float8_linear import multiply_in_float8
from internseg_ds.models.repeated_blocks import block_names, repeated_block
from internseg_ds.optimization.optimizers import group_limit, is_ranged
from internseg_ds.optimization.parameter_groups import parameter_groups
from internseg_ds.optimization.ranged_adam import bundles, kinds_of
from internseg_ds.planning.activation_memory import (
    Activations,
    evaluation_bytes,
    most_bytes,
    training_activations,
)
from internseg_ds.planning.block_work import BlockWork, block_work
from internseg_ds.planning.flops import TrainingPass, training_pass
from internseg_ds.planning.image_sizes import crop_size, evaluation_size
from internseg_ds.planning.memory_estimate import (
    MARGIN,
    EvaluationPass,
    MemoryEstimate,
    Platform,
    Run,
    estimate_memory,
)
from internseg_ds.planning.zero_settings import ZeroSettings, total_elements

DsConfigSource = str | os.PathLike | Mapping[str, Any]
"""Path of a ds_config, or its content."""


class Estimator:
    """What an experiment needs. Raises ConfigError for a model that cannot be built, and for a training image
    of unknown size."""

    def __init__(
        self, experiment: Experiment, model: nn.Module | None = None, *, crop: tuple[int, int] | None = None
    ) -> None:
        """model: of the experiment, on the meta device, where it is built already. crop: height and width of
        a training image, None: as the pipeline says."""
        self.experiment = experiment
        if model is None:
            model = build_on_meta(experiment.model)
            set_activation_checkpointing(model, experiment.engine.recomputation)
            choose_trained(model, experiment.engine)
        self.model = model
        self.crop = crop or crop_size(experiment)
        groups = parameter_groups(model, experiment.optimizer)
        self.setting_sizes = [sum(param.numel() for param in group["params"]) for group in groups]
        """Elements of each set of parameters with settings (lr, weight decay) of its own."""
        self._kinds = kinds_of(groups)
        self.matrices = [
            (param.shape[0], param.shape[1])
            for group, of_muon in zip(groups, self._kinds, strict=True)
            if of_muon
            for param in group["params"]
        ]
        """Rows and columns of the parameters that Muon trains."""
        self._activations: dict[tuple[Precision, torch.dtype], Activations] = {}
        self._evaluations: dict[tuple[Precision, torch.dtype], EvaluationPass] = {}
        self._under: dict[CheckpointingPolicy, Estimator] = {}

    @property
    def checkpointing(self) -> CheckpointingPolicy:
        """The activation checkpointing that the model has now."""
        backbone = self.model.get_submodule("backbone")
        if not getattr(backbone, "with_cp", False):
            return "none"
        policy: CheckpointingPolicy = getattr(backbone, "recomputation", "blocks")
        return policy

    def under(self, checkpointing: CheckpointingPolicy) -> "Estimator":
        """The same experiment with this activation checkpointing. Raises ConfigError for a backbone that has
        none."""
        if checkpointing not in self._under:
            model = copy.deepcopy(self.model)
            set_activation_checkpointing(model, checkpointing)
            self._under[checkpointing] = Estimator(self.experiment, model, crop=self.crop)
        return self._under[checkpointing]

    def resolve(self, ds_config: DsConfigSource, world_size: int) -> tuple[DsConfig, bool]:
        """The ds_config for so many processes, and whether they keep the recipe's batch
        (`engine.global_batch`).

        Where its images cannot be divided among them, each takes one micro-batch per step, or as many as stay
        below it. Raises ConfigError for what `resolve_ds_config` refuses.
        """
        experiment = self.experiment
        batch = experiment.engine.global_batch
        accumulation = experiment.gradient.accumulation
        at_once = world_size * experiment.micro_batch
        keeps_batch = batch is None or batch % at_once == 0
        if batch is not None and not keeps_batch:
            accumulation = max(1, batch // at_once)
            batch = None
        ds = ds_config_of(
            experiment, ds_config, self.model, world_size, global_batch=batch, accumulation=accumulation
        )
        return ds, keeps_batch

    def group_sizes(self, ds: DsConfig) -> list[int]:
        """Elements of each parameter group that DeepSpeed gets."""
        if not is_ranged(self.experiment.optimizer, ds):
            return self.setting_sizes
        return [
            sum(self.setting_sizes[number] for number in numbers)
            for numbers in bundles(self.setting_sizes, group_limit(ds), self._kinds)
        ]

    @cached_property
    def training_pass(self) -> TrainingPass:
        """FLOPs of a training image, and the order of the modules."""
        return training_pass(self.model, *self.crop)

    @cached_property
    def block_work(self) -> BlockWork:
        """What compiled blocks and float8 products change of it."""
        return block_work(self.model, *self.crop)

    def memory(self, ds: DsConfig, platform: Platform, *, evaluates: bool = True) -> MemoryEstimate:
        """Of one process. evaluates: whether the run does. Takes seconds to minutes for a model of some
        billion parameters. Raises ConfigError for settings whose memory is not modelled."""
        uses = self.training_pass.uses if ds.stage == 3 else None
        key = ds.precision, platform.compute_dtype(self.experiment, ds)
        evaluation = self._evaluation_pass(*key) if evaluates else None
        return estimate_memory(self._run(ds, platform, uses=uses, evaluation=evaluation), platform)

    def training_memory(self, ds: DsConfig, platform: Platform) -> MemoryEstimate:
        """Of one process in training alone, with the upper bound of the weights that ZeRO-3 gathers: quicker
        than `memory`, since the order of the modules is not looked at. Raises ConfigError as it does."""
        return estimate_memory(self._run(ds, platform), platform)

    def fits_for_sure(self, ds: DsConfig, device_bytes: float) -> bool:
        """Whether a run fits into so many bytes by an upper bound that takes no look at the backward pass."""
        # bytes per parameter: 16 for master weights, moments and average; 8 for gradients and weights in the
        # wider dtype; 8 for a copy of both
        state = 32 * total_elements(self.model)
        settings = ZeroSettings.of(ds)
        # ZeRO-3 has one and sends two buckets' worth (`zero_memory`); ZeRO-1 and 2 have two
        buckets = 3 * settings.bytes_per_weight * settings.reduce_bucket
        # assumed: `memory_estimate.CONTEXT`, and 1 GiB for what has no bound here
        rest = 3 * 2**30
        return state + buckets + self._activation_bound + rest <= (1 - MARGIN) * device_bytes

    @cached_property
    def _activation_bound(self) -> int:
        """More than the activations of a micro-batch can take, under any activation checkpointing."""
        return most_bytes(self.model, *self.crop, self.experiment.micro_batch)

    def _run(self, ds: DsConfig, platform: Platform, **more: Any) -> Run:
        """more: `uses` and `evaluation` of the Run."""
        if (dtype := ds.raw.get("data_types", {}).get("grad_accum_dtype")) is not None:
            raise ConfigError(
                f"data_types.grad_accum_dtype={dtype!r} of {ds.source} changes what DeepSpeed keeps in a "
                "way that the estimate does not know; estimate without it"
            )
        options = self.experiment.engine
        return Run(
            self.model,
            ZeroSettings.of(ds),
            self.group_sizes(ds),
            self._training_activations(ds.precision, platform.compute_dtype(self.experiment, ds)),
            ema=options.ema is not None,
            background_save=options.background_save,
            matrices=self.matrices,
            **more,
        )

    def _training_activations(self, precision: Precision, compute: torch.dtype) -> Activations:
        key = precision, compute
        if key not in self._activations:
            self._activations[key] = training_activations(
                self._in_precision(precision, compute),
                *self.crop,
                self.experiment.micro_batch,
                autocast=precision == "autocast",
            )
        return self._activations[key]

    def _evaluation_pass(self, precision: Precision, compute: torch.dtype) -> EvaluationPass:
        """Of windows, or of whole images as large as the test pipeline may make them."""
        key = precision, compute
        if key not in self._evaluations:
            model = self._in_precision(precision, compute)
            test_cfg = self.experiment.model.test_cfg
            image = evaluation_size(self.experiment)
            patch = patch_size(model.backbone)
            height, width = (
                -(-side // patch) * patch
                for side in (test_cfg["crop_size"] if test_cfg["mode"] == "slide" else image)
            )
            self._evaluations[key] = EvaluationPass(
                image,
                classes=model.out_channels,
                forward=cache(
                    lambda windows: evaluation_bytes(
                        model, height, width, windows, autocast=precision == "autocast"
                    )
                ),
                batch=test_cfg.get("batch_size", WINDOWS_PER_FORWARD),
                in_step=test_cfg.get("batch_size", 1),
                weights=self.experiment.engine.evaluation_weights,
            )
        return self._evaluations[key]

    def _in_precision(self, precision: Precision, compute: torch.dtype) -> BaseSegmentor:
        """A copy of the model, on the meta device, in the dtypes that it trains in."""
        model = copy.deepcopy(self.model)
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        apply_precision(
            model,
            compute,
            heads=heads_dtype(self.experiment.engine.heads_dtype, model, precision),
            autocast=precision == "autocast",
        )
        if self.experiment.engine.matmul_dtype == "float8" and precision == "bf16":
            backbone = model.get_submodule("backbone")
            multiply_in_float8(backbone, block_names(backbone))
        return model


def ds_config_of(
    experiment: Experiment,
    ds_config: DsConfigSource,
    model: nn.Module,
    world_size: int,
    *,
    global_batch: int | None,
    accumulation: int | None,
) -> DsConfig:
    """The ds_config filled in from an experiment and its model. global_batch, accumulation: those of the
    experiment, or of a cluster that cannot keep them.

    Raises ConfigError where `resolve_ds_config` does.
    """
    backbone = model.get_submodule("backbone")
    return resolve_ds_config(
        ds_config,
        experiment=experiment.path,
        micro_batch=experiment.micro_batch,
        world_size=world_size,
        optimizer=experiment.optimizer,
        per_step=BatchPerStep(global_batch, accumulation),
        gradient_clipping=experiment.gradient.clipping,
        sizes=BackboneSizes(vector_length(backbone), repeated_block(backbone)),
        optimizer_states=experiment.engine.optimizer_states,
    )
