"""Segmenting with finished weights from any weight file: whole on each process, or, where a device has no room for them, partitioned by ZeRO-3."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from internseg_ds.checkpoints.weights import open_weights, refuse_unfit
from internseg_ds.distributed.construction import build_for_training, build_on_meta, fill
from internseg_ds.distributed.ds_config import resolve_ds_config
from internseg_ds.distributed.gathering import Forwards, copy_fits
from internseg_ds.distributed.loading import fit_segmentor, load, resized, watched
from internseg_ds.distributed.precision import apply_precision, backbone_dtype, heads_dtype, set_fp32_matmul
from internseg_ds.distributed.process_group import World
from internseg_ds.engine.experiment import Experiment


def ready(
    experiment: Experiment, checkpoint: str | os.PathLike, world: World, *, ema: bool = False
) -> Forwards:
    """The forwards of a config's segmentor with the weights of `checkpoint`. Collective; `engine.evaluation_weights` says whether weights are whole.

    ema: of a ZeRO checkpoint, the averaged weights. Raises CheckpointError when the weights are not those of this model.
    """
    set_fp32_matmul(experiment.engine.fp32_matmul, world.device)
    how = experiment.engine.evaluation_weights
    compute = backbone_dtype(experiment.engine.backbone_dtype, world.device)
    if (
        how == "whole"
        or world.size == 1
        or (how == "auto" and copy_fits(_whole_bytes(experiment, compute), world.device))
    ):
        return Forwards(load_trained(experiment, checkpoint, world.device, ema=ema))
    return Forwards(_load_partitioned(experiment, checkpoint, world, compute, ema=ema), in_step=True)


def _whole_bytes(experiment: Experiment, compute: torch.dtype) -> int:
    params = build_on_meta(experiment.model).named_parameters()
    return sum(
        param.numel() * (compute if name.startswith("backbone.") else torch.float32).itemsize
        for name, param in params
    )


def _load_partitioned(
    experiment: Experiment, checkpoint: str | os.PathLike, world: World, compute: torch.dtype, *, ema: bool
) -> nn.Module:
    """The segmentor under ZeRO-3 without an optimizer, all weights in `compute`, those of the heads too; each process reads its share."""
    import deepspeed

    ds = resolve_ds_config(
        {"bf16": {"enabled": compute == torch.bfloat16}, "zero_optimization": {"stage": 3}},
        experiment=experiment.path,
        micro_batch=experiment.micro_batch,
        world_size=world.size,
        optimizer=experiment.optimizer,
    )
    model = build_for_training(experiment.model, ds, world.device, seed=0)
    load(
        model,
        fit_segmentor(model, open_weights(Path(checkpoint), ema=ema, check=experiment.engine.checksums)),
    )
    apply_precision(model, compute, heads=heads_dtype(experiment.engine.heads_dtype, model))
    engine, *_ = deepspeed.initialize(model=model, config=ds.raw)
    return engine.module.eval()


def load_trained(
    experiment: Experiment, checkpoint: str | os.PathLike, device: torch.device, *, ema: bool = False
) -> nn.Module:
    """The segmentor of a config with the weights of `checkpoint` (.pth, .safetensors, or a ZeRO checkpoint directory), in eval mode on `device`.

    ema: of a ZeRO checkpoint, the averaged weights. The backbone is stored in the dtype in which it computes, the rest in fp32. Raises CheckpointError
    when the weights are not those of this model, or no weights at all (NaN, infinite, integers).
    """
    model = build_on_meta(experiment.model)
    compute = backbone_dtype(experiment.engine.backbone_dtype, device)
    found, unfit = (
        fit_segmentor(model, open_weights(Path(checkpoint), ema=ema, check=experiment.engine.checksums)),
        {},
    )
    weights = watched(model, found, unfit)

    def parameter(name: str, shape: torch.Size) -> Tensor:
        value = resized(model, name, weights.read(found.sources[name]), shape)
        return value.to(device, compute if name.startswith("backbone.") else torch.float32)

    def buffer(name: str, hollow: Tensor) -> Tensor:  # a batch norm's counter may be missing
        return (
            weights.read(found.sources[name]).to(device)
            if name in found.sources
            else torch.zeros_like(hollow, device=device)
        )

    fill(model, parameter, buffer)
    refuse_unfit(weights, unfit)
    apply_precision(model, compute, heads=heads_dtype(experiment.engine.heads_dtype, model))
    return model.eval()
