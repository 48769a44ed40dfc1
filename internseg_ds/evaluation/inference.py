"""Opening a trained segmentor from a config and a weight file: whole on each process, or, where a device has
no memory for that, partitioned by ZeRO-3.

What launch/test.py and launch/predict.py have in common: `InferenceRun.open` reads the config, the callers
check what they need besides, `InferenceRun.check_weights` checks the weight file, and `trained_segmentor`
joins the processes and loads it. Every check comes before a process takes its device.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internseg_ds.checkpoints.weights import Weights, open_weights, refuse_invalid
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.experiment import Experiment, read_experiment
from internseg_ds.distributed.construction import (
    build_for_training,
    build_on_meta,
    constructed_buffers,
    fill,
)
from internseg_ds.distributed.gathering import Forwards, runs_on_whole_weights
from internseg_ds.distributed.precision import (
    apply_precision,
    backbone_dtype,
    compute_dtypes,
    heads_dtype,
    set_fp32_matmul,
)
from internseg_ds.distributed.process_group import World, world_from_environment
from internseg_ds.distributed.watchdog import joined
from internseg_ds.distributed.weight_loading import load, match_segmentor, resized, watched
from internseg_ds.monitoring.run_log import start_logging
from internseg_ds.preflight.model_checks import check_windows
from internseg_ds.preflight.starting_weights import check_weights_fit
from internseg_ds.progress import BYTES, progress


@dataclass(frozen=True)
class InferenceRun:
    """A config, trained weights for it, and this process's place."""

    experiment: Experiment
    checkpoint: Path
    """.pth, .safetensors, a Hugging Face folder, or a ZeRO checkpoint directory."""
    ema: bool
    """Of a ZeRO checkpoint, the averaged weights."""
    world: World

    @classmethod
    def open(
        cls,
        config: str | os.PathLike,
        checkpoint: str | os.PathLike,
        *,
        ema: bool,
        cfg_options: Mapping[str, Any] | None,
    ) -> "InferenceRun":
        """Read the config and start logging. Raises ConfigError, also where `model.test_cfg` does not say
        how to evaluate an image."""
        world = world_from_environment()
        experiment = read_experiment(config, cfg_options)
        start_logging(None, level=experiment.logging.level, is_main=world.is_main)
        check_windows(experiment)
        return cls(experiment, Path(checkpoint), ema, world)

    def check_weights(self, meta_model: nn.Module) -> dict[str, Any]:
        """The weight file's metadata (CLASSES, PALETTE, ...).

        meta_model: the config's segmentor on the meta device. Raises CheckpointError when the file is not
        there or does not match it.
        """
        return check_weights_fit(
            meta_model, self.checkpoint, ema=self.ema, check=self.experiment.engine.checksums
        )


@contextmanager
def trained_segmentor(run: InferenceRun) -> Iterator[Forwards]:
    """The forwards of the segmentor with the weights of `run`, in the process group of all ranks. Collective.

    `engine.evaluation_weights` says whether the weights are whole. Raises CheckpointError when they are not
    those of this model.
    """
    experiment = run.experiment
    with joined(run.world):
        device = run.world.device
        set_fp32_matmul(experiment.engine.fp32_matmul, device)
        compute = backbone_dtype(experiment.engine.backbone_dtype, device)
        if runs_on_whole_weights(
            experiment.engine.evaluation_weights,
            device,
            partitionable=run.world.size > 1,
            whole_bytes=partial(_whole_bytes, experiment, compute),
        ):
            yield Forwards(load_trained(experiment, run.checkpoint, device, ema=run.ema))
        else:
            yield Forwards(_load_partitioned(run, compute), in_step=True)


def _whole_bytes(experiment: Experiment, compute: torch.dtype) -> int:
    """Of all weights, as `load_trained` stores them."""
    params = build_on_meta(experiment.model).named_parameters()
    return sum(param.numel() * _stored_dtype(name, compute).itemsize for name, param in params)


def _stored_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a whole segmentor: for the backbone the one it computes in, which halves
    its memory in bf16."""
    return compute if name.startswith("backbone.") else torch.float32


def _load_partitioned(run: InferenceRun, compute: torch.dtype) -> nn.Module:
    """The segmentor under ZeRO-3 without an optimizer, in eval mode; each process reads its share.

    All parameters are stored in `compute`, those of the heads too: a DeepSpeed engine has one dtype.
    """
    import deepspeed

    experiment = run.experiment
    ds = resolve_ds_config(
        {"bf16": {"enabled": compute == torch.bfloat16}, "zero_optimization": {"stage": 3}},
        experiment=experiment.path,
        micro_batch=experiment.micro_batch,
        world_size=run.world.size,
        optimizer=experiment.optimizer,
    )
    model = build_for_training(experiment.model, ds, run.world.device, seed=0)
    weights = open_weights(run.checkpoint, ema=run.ema, check=experiment.engine.checksums)
    load(model, match_segmentor(model, weights))
    apply_precision(model, compute, heads=heads_dtype(experiment.engine.heads_dtype, model))
    engine, *_ = deepspeed.initialize(model=model, config=ds.raw)
    return engine.module.eval()


def load_trained(
    experiment: Experiment, checkpoint: str | os.PathLike, device: torch.device, *, ema: bool = False
) -> nn.Module:
    """Load the segmentor of a config with the weights of `checkpoint` (.pth, .safetensors, or a ZeRO
    checkpoint directory), whole, in eval mode on `device`.

    ema: of a ZeRO checkpoint, the averaged weights. Raises CheckpointError as `with_weights` does.
    """
    opened = open_weights(Path(checkpoint), ema=ema, check=experiment.engine.checksums)
    return with_weights(experiment, opened, device)


def with_weights(experiment: Experiment, opened: Weights, device: torch.device) -> nn.Module:
    """The segmentor of a config with these weights, whole, in eval mode on `device`.

    The backbone is stored in the dtype in which it computes, the rest in fp32. Raises CheckpointError when the
    weights are not those of this model, or no weights at all (NaN, infinite, integers).
    """
    model = build_on_meta(experiment.model)
    dtypes = compute_dtypes(experiment.engine, model, device)
    found = match_segmentor(model, opened)
    invalid: dict[str, str] = {}
    weights = watched(model, found, invalid)

    def parameter(name: str, shape: torch.Size) -> Tensor:
        value = resized(model, name, weights.read(found.sources[name]), shape)
        value = value.to(device, _stored_dtype(name, dtypes.backbone))
        done.advance(value.nbytes)
        return value

    def buffer(name: str, _: Tensor) -> Tensor:
        if name in found.sources:
            return weights.read(found.sources[name]).to(device)
        return constructed[name].to(device)

    lacking = [name for name, _ in model.named_buffers() if name not in found.sources]
    # tables of positions, and the counters of batch norms, which files may lack
    constructed = constructed_buffers(experiment.model) if lacking else {}
    total = sum(
        each.numel() * _stored_dtype(name, dtypes.backbone).itemsize
        for name, each in model.named_parameters()
    )
    with progress("loading weights", total, BYTES) as done:
        fill(model, parameter, buffer)
    refuse_invalid(weights, invalid)
    apply_precision(model, dtypes.backbone, heads=dtypes.heads)
    return model.eval()
