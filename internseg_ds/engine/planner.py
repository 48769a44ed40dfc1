"""An experiment on paper: its model on the meta device, and what `planning` finds out about it, each once, for any ds_config and cluster.

In: an experiment. Out: the step time and the memory that it will take. Takes no accelerator and reads no data.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import nn

from internseg_ds.distributed.construction import build_on_meta, choose_recomputation, freeze_parts
from internseg_ds.distributed.ds_config import DsConfig, Precision, resolve_ds_config
from internseg_ds.distributed.gathering import ROOM
from internseg_ds.distributed.optimizers import group_limit, is_ranged
from internseg_ds.distributed.parameter_groups import parameter_groups
from internseg_ds.distributed.precision import apply_precision, heads_dtype
from internseg_ds.distributed.ranged_adam import bundles
from internseg_ds.engine.experiment import Experiment, leaf_datasets
from internseg_ds.engine.options import EngineOptions
from internseg_ds.engine.segmenting import BATCH_SIZE, CHUNK_BYTES
from internseg_ds.errors import ConfigError
from internseg_ds.models.backbone import patch_size, vector_length
from internseg_ds.models.blocks import repeated_block
from internseg_ds.models.recomputation import Recomputation
from internseg_ds.planning.activations import Activations, evaluation_bytes, most_bytes, training_activations
from internseg_ds.planning.communication import host_bytes, step_traffic
from internseg_ds.planning.footprint import MARGIN, Evaluation, Footprint, footprint
from internseg_ds.planning.memory import state
from internseg_ds.planning.step_time import Assumptions, Cluster, StepTime, step_time
from internseg_ds.planning.training_pass import TrainingPass, training_pass


@dataclass(frozen=True)
class Row:
    """One cluster. Bytes are per GPU; of training state, and sent in one optimizer step. keeps_batch: whether the recipe's batch could be kept."""

    cluster: Cluster
    global_batch: int
    accumulation: int
    keeps_batch: bool
    gpu_state: int
    host_state: int
    within_node: float
    between_nodes: float
    time: StepTime
    hours: float

    @property
    def images_per_s(self) -> float:
        return self.global_batch / self.time.step


class Planner:
    """Raises ConfigError for a model that cannot be built, and for a training image of unknown size."""

    def __init__(
        self, experiment: Experiment, model: nn.Module | None = None, *, crop: tuple[int, int] | None = None
    ) -> None:
        """model: of the experiment, on the meta device, where it is built already. crop: height and width of a training image, None: as the pipeline says."""
        self.experiment = experiment
        self.model = model if model is not None else build_on_meta(experiment.model)
        if model is None:
            choose_recomputation(self.model, experiment.engine.recomputation)
            freeze_parts(self.model, experiment.engine.freeze)
        self.crop = crop or crop_size(experiment)
        self.setting_sizes = [
            sum(param.numel() for param in group["params"])
            for group in parameter_groups(self.model, experiment.optimizer)
        ]
        self._found: dict[tuple[Precision, torch.dtype, bool], tuple[Activations, Evaluation | None]] = {}
        self._under: dict[Recomputation, Planner] = {}

    @property
    def recomputation(self) -> Recomputation:
        """The activation checkpointing that the model has now."""
        backbone = self.model.backbone
        return getattr(backbone, "recomputation", "blocks") if getattr(backbone, "with_cp", False) else "none"

    def under(self, recomputation: Recomputation) -> "Planner":
        """The same experiment with this activation checkpointing. Raises ConfigError for a backbone that has none."""
        if recomputation not in self._under:
            model = copy.deepcopy(self.model)
            choose_recomputation(model, recomputation)
            self._under[recomputation] = Planner(self.experiment, model, crop=self.crop)
        return self._under[recomputation]

    def group_sizes(self, ds: DsConfig) -> list[int]:
        """Elements of each parameter group that DeepSpeed gets."""
        if not is_ranged(self.experiment.optimizer, ds):
            return self.setting_sizes
        return [
            sum(self.setting_sizes[number] for number in numbers)
            for numbers in bundles(self.setting_sizes, group_limit(ds))
        ]

    @cached_property
    def passed(self) -> TrainingPass:
        return training_pass(self.model, *self.crop)

    def resolve(
        self, ds_config: str | os.PathLike | Mapping[str, Any], world_size: int
    ) -> tuple[DsConfig, bool]:
        """The ds_config for so many processes, and whether they keep the recipe's batch (`engine.global_batch`).

        Where its images cannot be shared out among them, each takes one micro-batch per step, or as many as stay below it. Raises ConfigError for what
        `resolve_ds_config` refuses.
        """
        experiment, batch = self.experiment, self.experiment.engine.global_batch
        accumulation = experiment.accumulation
        keeps = batch is None or batch % (world_size * experiment.micro_batch) == 0
        if not keeps:
            batch, accumulation = None, max(1, batch // (world_size * experiment.micro_batch))
        return ds_config_of(
            experiment, ds_config, self.model, world_size, global_batch=batch, accumulation=accumulation
        ), keeps

    def row(
        self, ds_config: str | os.PathLike | Mapping[str, Any], cluster: Cluster, assumed: Assumptions
    ) -> Row:
        """Raises ConfigError where `resolve` does, and for settings whose time or traffic is not modelled."""
        experiment = self.experiment
        if experiment.engine.backbone_dtype == "float32":
            raise ConfigError(
                "engine.backbone_dtype='float32' cannot be planned: the times are of a backbone that computes in bfloat16; drop it"
            )
        ds, keeps = self.resolve(ds_config, cluster.world_size)
        if ds.precision == "fp32":
            raise ConfigError(
                f"{ds.source} trains in fp32, whose time the plan does not know; enable bf16 or torch_autocast"
            )
        zero, width = ds.raw["zero_optimization"], 2 if ds.precision == "bf16" else 4
        traffic = step_traffic(
            self.model,
            self.passed.uses,
            self.group_sizes(ds),
            zero,
            width=width,
            world_size=ds.world_size,
            accumulation=ds.accumulation,
        )
        links = [part.sent_by_link(cluster.per_node) for part in traffic]
        moved = host_bytes(self.model, traffic, zero, width=width, world_size=ds.world_size)
        time = step_time(
            self.passed,
            ds.micro_batch,
            traffic,
            sum(self.setting_sizes),
            moved,
            zero,
            cluster,
            assumed,
            heads=heads_products(experiment.engine),
        )
        kept = state(self.model, ds.raw, ds.precision, ds.world_size, ds.accumulation)
        images = experiment.max_steps * (experiment.engine.global_batch or ds.global_batch)
        return Row(
            cluster,
            ds.global_batch,
            ds.accumulation,
            keeps,
            gpu_state=sum(part.device for part in kept),
            host_state=sum(part.host for part in kept),
            within_node=sum(within for within, _ in links),
            between_nodes=sum(between for _, between in links),
            time=time,
            hours=images / ds.global_batch * time.step / 3600,
        )

    @cached_property
    def most_bytes(self) -> int:
        """More than the activations of a micro-batch can take, whatever is recomputed."""
        return most_bytes(self.model, *self.crop, self.experiment.micro_batch)

    def is_small_beside(self, ds: DsConfig, size: float) -> bool:
        """Whether a run fits into so many bytes by a bound that is quickly had: nothing need be planned."""
        params = sum(param.numel() for param in self.model.parameters())
        state = (
            32 * params
        )  # masters, moments, their average, gradients, weights and a copy of them, in whatever dtype
        buckets = (
            3
            * ds.param_dtype.itemsize
            * int(float(ds.raw["zero_optimization"].get("reduce_bucket_size", 500_000_000)))
        )
        return state + buckets + self.most_bytes + 3 * 2**30 <= (1 - MARGIN) * size

    def footprint(
        self,
        ds: DsConfig,
        device_bytes: float,
        *,
        compute: torch.dtype | None = None,
        validate: bool = True,
        exact: bool = True,
        on_gpu: bool = True,
    ) -> Footprint:
        """Of one process on a device with so much memory. compute: the dtype that the backbone computes in; None: as on GPUs (`backbone_dtype`).

        exact: False takes the upper bound of the weights that ZeRO-3 gathers, which saves looking at the order of the modules.
        """
        options = self.experiment.engine
        if (dtype := ds.raw.get("data_types", {}).get("grad_accum_dtype")) is not None:
            raise ConfigError(
                f"data_types.grad_accum_dtype={dtype!r} of {ds.source} changes what DeepSpeed keeps in a way that the plan does not know; "
                "plan without it"
            )
        if compute is None:
            compute = (
                torch.float32
                if ds.precision == "fp32" or options.backbone_dtype == "float32"
                else torch.bfloat16
            )
        activations, evaluation = self._passes(ds.precision, compute, validate)
        return footprint(
            self.model,
            ds.raw,
            ds.precision,
            world_size=ds.world_size,
            accumulation=ds.accumulation,
            group_sizes=self.group_sizes(ds),
            uses=self.passed.uses if exact and ds.stage == 3 else None,
            activations=activations,
            evaluation=evaluation if validate else None,
            ema=options.ema is not None,
            background_save=options.background_save,
            device_bytes=device_bytes,
            on_gpu=on_gpu,
        )

    def _passes(
        self, precision: Precision, compute: torch.dtype, validate: bool
    ) -> tuple[Activations, Evaluation | None]:
        key = precision, compute, validate
        if key not in self._found:
            model = copy.deepcopy(self.model)
            model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
            autocast = precision == "autocast"
            apply_precision(
                model,
                compute,
                heads=heads_dtype(self.experiment.engine.heads_dtype, model, precision),
                autocast=autocast,
            )
            activations = training_activations(
                model, *self.crop, self.experiment.micro_batch, autocast=autocast
            )
            self._found[key] = activations, self._evaluation(model, autocast) if validate else None
        return self._found[key]

    def _evaluation(self, model: nn.Module, autocast: bool) -> Evaluation:
        """Of windows, or of whole images as large as the test pipeline may make them."""
        test_cfg, image, patch = (
            self.experiment.model.test_cfg,
            evaluation_size(self.experiment),
            patch_size(model.backbone),
        )
        height, width = (
            -(-side // patch) * patch
            for side in (test_cfg["crop_size"] if test_cfg["mode"] == "slide" else image)
        )
        forward = cache(lambda windows: evaluation_bytes(model, height, width, windows, autocast=autocast))
        return Evaluation(
            image,
            model.out_channels,
            forward,
            test_cfg.get("batch_size", BATCH_SIZE),
            test_cfg.get("batch_size", 1),
            self.experiment.engine.evaluation_weights,
            ROOM,
            CHUNK_BYTES,
        )


def heads_products(options: EngineOptions) -> Literal["bf16", "tf32", "fp32"]:
    """What a GPU multiplies the heads' matrices in."""
    if options.heads_dtype == "bfloat16":
        return "bf16"
    return "tf32" if options.fp32_matmul == "tf32" else "fp32"


def ds_config_of(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    model: nn.Module,
    world_size: int,
    *,
    global_batch: int | None,
    accumulation: int | None,
) -> DsConfig:
    """The ds_config filled in from an experiment and its model. global_batch, accumulation: those of the experiment, or of a cluster that cannot keep them.

    Raises ConfigError where `resolve_ds_config` does.
    """
    return resolve_ds_config(
        ds_config,
        experiment=experiment.path,
        micro_batch=experiment.micro_batch,
        world_size=world_size,
        optimizer=experiment.optimizer,
        global_batch=global_batch,
        accumulation=accumulation,
        gradient_clipping=experiment.gradient_clipping,
        hidden_size=vector_length(model.backbone),
        block=repeated_block(model.backbone),
    )


def crop_size(experiment: Experiment) -> tuple[int, int]:
    """Height and width of the training images, in pixels, from the last step of the pipeline that fixes them. Raises ConfigError when none does."""
    train = next(leaf_datasets(experiment.train))
    for step in reversed(train.get("pipeline", ())):
        for key in ("crop_size", "size"):
            if step.get("type") in ("RandomCrop", "Pad") and isinstance(step.get(key), (list, tuple)):
                return tuple(step[key])
    raise ConfigError(
        f"the size of a training image cannot be told: data.train.pipeline of {experiment.path} has neither RandomCrop.crop_size "
        "nor Pad.size; add one"
    )


def evaluation_size(experiment: Experiment) -> tuple[int, int]:
    """Height and width that an evaluated image may have, from the `img_scale` of its pipeline; a training crop's where there is none."""
    scales = [
        scale for leaf in leaf_datasets(experiment.val or []) for scale in _scales(leaf.get("pipeline", ()))
    ]
    if not scales:
        return crop_size(experiment)
    largest = max(scales, key=lambda scale: scale[0] * scale[1])
    return min(largest), max(largest)


def _scales(pipeline: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    for step in pipeline:
        scale = step.get("img_scale")
        ratios = step.get("img_ratios") or (1.0,)
        for each in (
            [scale]
            if isinstance(scale, (list, tuple)) and scale and isinstance(scale[0], int)
            else scale or ()
        ):
            for ratio in ratios if isinstance(ratios, (list, tuple)) else (ratios,):
                yield int(each[0] * ratio), int(each[1] * ratio)
        yield from _scales(step.get("transforms", ()))
