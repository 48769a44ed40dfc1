"""Everything that can be refused is refused here: config, ds_config, model, data and weight files, checked together before any accelerator memory is taken.

In: what the user gave. Out: a `Plan`, from which `SegmentorEngine` is built and which `--dry-run` prints. Runs on every rank alike and talks to no other.
"""

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmcv.parallel import DataContainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from internseg_ds.checkpoints.fitting import Fit
from internseg_ds.checkpoints.weights import Weights, open_weights
from internseg_ds.data.datasets import build_datasets, first_sample
from internseg_ds.distributed.construction import build_on_meta, choose_recomputation
from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.distributed.loading import fit_backbone, fit_segmentor
from internseg_ds.distributed.optimizers import check_optimizer
from internseg_ds.distributed.parameter_groups import parameter_groups
from internseg_ds.distributed.precision import backbone_dtype, heads_dtype
from internseg_ds.distributed.process_group import World
from internseg_ds.engine.checkpointing import check_resumable, named_groups
from internseg_ds.engine.experiment import Experiment, leaf_datasets
from internseg_ds.engine.forecast import memory_table, of_this_run, verdict
from internseg_ds.engine.planner import Planner, ds_config_of
from internseg_ds.engine.trackers import check_trackers
from internseg_ds.errors import CheckpointError, ConfigError, DataError
from internseg_ds.models.backbone import patch_size, pretrained_elsewhere, pretrained_file
from internseg_ds.models.heads import heads

TOLERATED = 8
"""Damaged images at the start of a validation set, which an evaluation will leave out, that are no reason to think its pipeline wrong."""


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check. meta_model: the segmentor on the meta device, for shapes and names. crop: height and width of a training image."""

    experiment: Experiment
    ds: DsConfig
    world: World
    meta_model: nn.Module
    crop: tuple[int, int]
    train_set: Dataset
    val_set: Dataset | None


def check(experiment: Experiment, ds_config: str | os.PathLike | Mapping[str, Any], world: World, *, validate: bool = True,
          load_from: str | os.PathLike | None = None, resume_from: Path | None = None) -> Plan:
    """Raises UserError (ConfigError, DataError, CheckpointError) with one sentence for whatever cannot work.

    validate: whether the run will evaluate, and so needs the validation set. resume_from: the checkpoint that it goes on from; it needs no other weights.
    """
    meta_model = build_on_meta(experiment.model)
    choose_recomputation(meta_model, experiment.engine.recomputation)
    if experiment.engine.recomputation == "auto":
        choose_recomputation(copy.deepcopy(meta_model), "blocks")  # whether there is something to choose
    ds = ds_config_of(experiment, ds_config, meta_model, world.size, global_batch=experiment.engine.global_batch, accumulation=experiment.accumulation)
    if ds.stage == 0:
        raise ConfigError(f"{ds.source} names no ZeRO stage; write \"zero_optimization\": {{\"stage\": 3}} (or 1, 2), or take one of ds_configs/")
    backbone_dtype(experiment.engine.backbone_dtype, world.device, ds.precision)
    heads_dtype(experiment.engine.heads_dtype, meta_model, ds.precision)
    check_offload(experiment, ds, resume_from)
    groups = parameter_groups(meta_model, experiment.optimizer)
    check_optimizer(experiment.optimizer, ds)
    check_windows(experiment)
    check_patches(experiment, meta_model)
    if resume_from is None:
        check_weights(experiment, meta_model, load_from)
    else:
        check_resumable(resume_from, meta_model, named_groups(meta_model, groups))
    if world.is_main:
        check_trackers(experiment.log_hooks)
    train_set = build_datasets(experiment.train, "data.train", list(leaf_datasets(experiment.train)))
    check_classes(meta_model, train_set, "data.train")
    first = first_sample(train_set, "data.train", tolerated=experiment.engine.max_data_faults)
    check_sample(meta_model, first)
    check_forward(meta_model, first, ds.micro_batch, world.size)
    val_set = None
    if validate:
        val_set = validation_set(experiment)
        check_classes(meta_model, val_set, "data.val")
        first_sample(val_set, "data.val", tolerated=TOLERATED)
    return Plan(experiment, ds, world, meta_model, _image_shape(first)[1:], train_set, val_set)


def check_forward(model: nn.Module, sample: Mapping[str, Any], micro_batch: int, processes: int) -> None:
    """A forward on the meta device: layers whose sizes do not fit each other are found without memory or data, and batch norms that would get one value.

    A batch norm needs two values per channel in training, which one image pooled to a point does not give it. Raises ConfigError.
    """
    shape, starved = _image_shape(sample), []

    def look(name: str, norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        images = micro_batch * (processes if isinstance(norm, nn.SyncBatchNorm) else 1)
        if args[0].numel() // args[0].size(1) * images < 2:
            starved.append((name, norm))

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training]
    hooks = [norm.register_forward_pre_hook(lambda module, args, name=name: look(name, module, args)) for name, norm in norms]
    model.eval()  # batch norms in training mode would want values
    try:
        with torch.no_grad():
            features = model.extract_feat(torch.empty(1, *shape, device="meta"))
            for head in heads(model):
                head(features)
    except Exception as error:  # whatever some layer refuses with
        raise ConfigError(f"the model cannot take a training image of {shape}: {type(error).__name__}: {error}; do the in_channels of its heads fit?") from error
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    if starved:
        name, norm = starved[0]
        others = "train on more processes" if isinstance(norm, nn.SyncBatchNorm) else "use norm_cfg=dict(type='SyncBN')"
        raise ConfigError(f"batch norm {name} gets one value per channel from {micro_batch} image a process on {processes} process{'es' * (processes > 1)}, and needs "
                          f"two in training; raise data.samples_per_gpu, or {others}")


def _image_shape(sample: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height, width of a training image as its pipeline hands it over."""
    image = sample["img"]
    return tuple((image.data if isinstance(image, DataContainer) else image).shape)


def check_offload(experiment: Experiment, ds: DsConfig, resume_from: Path | None) -> None:
    """Averages and resumed runs read and write the optimizer's state in memory; on NVMe it is not there."""
    zero = ds.raw["zero_optimization"]
    on_nvme = [key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device") == "nvme"]
    if on_nvme and (resume_from is not None or experiment.engine.ema is not None):
        what = "engine.ema" if resume_from is None else "--resume"
        raise ConfigError(f"{what} cannot work with {on_nvme[0]}.device=\"nvme\" of {ds.source}; offload to \"cpu\"")


def check_weights(experiment: Experiment, meta_model: nn.Module, load_from: str | os.PathLike | None) -> None:
    """The weight file that the run starts from must be there and fit the model: names and shapes are compared, values are not read.

    load_from: whole segmentor given on the command line, else the config's load_from, else the backbone's `pretrained`. Raises CheckpointError.
    """
    for name in pretrained_elsewhere(meta_model):
        raise ConfigError(f"{'.'.join(filter(None, ['model', name]))}.init_cfg asks for pretrained weights, which are read for the backbone alone; drop it, and start from weights of "
                          "a whole segmentor with load_from=PATH")
    start = starting_weights(experiment, meta_model, load_from)
    if start is None:
        return
    option, path, fit = start
    if not path.exists():
        raise CheckpointError(f"{option}={str(path)!r}: there is no such file; put the weights there, or start from random weights with --cfg-options {option}=None")
    fit(meta_model, open_weights(path), experiment.engine.weights_may_differ)


def starting_weights(experiment: Experiment, model: nn.Module, load_from: str | os.PathLike | None) -> tuple[str, Path, Callable[[nn.Module, Weights, tuple[str, ...]], Fit]] | None:
    """Where a fresh run's weights come from: (setting, path, how they are matched), in order of precedence; None for random weights.

    Raises CheckpointError for an address on the web: nothing is downloaded here.
    """
    option, source, fit = "load_from", load_from or experiment.load_from, fit_segmentor
    if not source:
        option, source, fit = _pretrained_setting(experiment, model), pretrained_file(model.backbone), fit_backbone
    if not source:
        return None
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"{option}={source!r} must be a path, or None")
    if "://" in str(source):
        raise CheckpointError(f"{option}={str(source)!r} is an address, and nothing is downloaded here; download the file and write --cfg-options {option}=PATH, or "
                              f"start from random weights with --cfg-options {option}=None")
    return option, Path(source), fit


def _pretrained_setting(experiment: Experiment, model: nn.Module) -> str:
    """The setting that the backbone's `pretrained` comes from: mmcv's `init_cfg`, or its own argument, which mmseg also fills in from `model.pretrained`."""
    init_cfg = experiment.model.backbone.get("init_cfg")
    if isinstance(init_cfg, Mapping) and init_cfg.get("checkpoint") == pretrained_file(model.backbone):
        return "model.backbone.init_cfg.checkpoint"
    return "model.pretrained" if experiment.model.get("pretrained") else "model.backbone.pretrained"


def check_weights_fit(model: nn.Module, checkpoint: str | os.PathLike, *, ema: bool = False) -> dict[str, Any]:
    """A finished checkpoint must be there and fit the model (on the meta device); returns its meta (CLASSES, PALETTE, ...). Raises CheckpointError."""
    weights = open_weights(Path(checkpoint), ema=ema)
    fit_segmentor(model, weights)
    return weights.meta


def validation_set(experiment: Experiment, split: str = "val", *, truth: bool = True) -> Dataset:
    """The data set that is evaluated on, in test mode; split: "val" or "test". truth: whether there must be label maps; without, none is looked for.

    Raises DataError when it is missing or empty.
    """
    entry = experiment.test if split == "test" else experiment.val
    if entry is None:
        raise DataError(f"{experiment.path}: data has neither a 'val' nor a 'test' entry to evaluate on; add one, or train with --no-validate")
    if not truth:
        entry = copy.deepcopy(entry)
        for leaf in leaf_datasets(entry):
            leaf["ann_dir"] = None
    leaves = list(leaf_datasets(entry))
    if truth and any(leaf.get("ann_dir") is None for leaf in leaves):
        raise ConfigError(f"data.{split} of {experiment.path} has no ann_dir, so there is no ground truth to score against; set it (or train with --no-validate, or "
                          "write labels with launch/test.py --format-only DIR)")
    dataset = build_datasets(entry, f"data.{split}", leaves, test_mode=True)
    if isinstance(dataset, ConcatDataset):
        raise DataError(f"data.{split} joins {len(dataset.datasets)} data sets, but one is scored at a time; keep one of them")
    return dataset


def check_classes(model: nn.Module, dataset: Dataset, what: str) -> None:
    """The heads and the data set must count the same classes."""
    classes = getattr(dataset, "CLASSES", None)
    if classes is None:
        raise ConfigError(f"{what} does not name its classes; add classes=(...) and palette=[...] to it")
    for head in heads(model):
        if head.num_classes != len(classes):
            raise ConfigError(f"{type(head).__name__} predicts num_classes={head.num_classes} classes but {what} has {len(classes)}; make them equal")


def check_patches(experiment: Experiment, model: nn.Module) -> None:
    """Sizes that reach the backbone must be whole patches. Raises ConfigError naming the setting and the nearest size that works."""
    patch = patch_size(model.backbone)
    found = [("model.test_cfg.crop_size", experiment.model.test_cfg["crop_size"])] if experiment.model.test_cfg["mode"] == "slide" else []
    for leaf in leaf_datasets(experiment.train):
        for step in leaf.get("pipeline", ()):
            for kind, key in (("RandomCrop", "crop_size"), ("Pad", "size")):
                if step.get("type") == kind and isinstance(step.get(key), (list, tuple)):
                    found.append((f"data.train.pipeline {kind}.{key}", step[key]))
    for setting, size in found:
        for side in size:
            if side % patch:
                below = side // patch * patch
                raise ConfigError(f"{setting}={tuple(size)} of {experiment.path} is not a multiple of the patch size {patch}; use {below} or {below + patch}")


def check_windows(experiment: Experiment) -> None:
    """`model.test_cfg` must say how an evaluation goes over an image. Raises ConfigError."""
    test_cfg = experiment.model.get("test_cfg")
    if not isinstance(test_cfg, Mapping) or test_cfg.get("mode") not in ("slide", "whole"):
        mode = test_cfg.get("mode") if isinstance(test_cfg, Mapping) else None
        raise ConfigError(f"model.test_cfg.mode={mode!r} of {experiment.path} is neither 'slide' nor 'whole'; write test_cfg=dict(mode='whole'), or mode='slide' with "
                          "crop_size=(h, w) and stride=(h, w)")
    batch_size = test_cfg.get("batch_size", 1)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"model.test_cfg.batch_size={batch_size!r} of {experiment.path} must be a whole number of windows, at least 1")
    if test_cfg["mode"] == "whole":
        return
    for key in ("crop_size", "stride"):
        if not isinstance(test_cfg.get(key), (list, tuple)) or len(test_cfg[key]) != 2 or not all(isinstance(side, int) and side > 0 for side in test_cfg[key]):
            raise ConfigError(f"model.test_cfg.{key}={test_cfg.get(key)!r} of {experiment.path}: mode='slide' needs crop_size=(h, w) and stride=(h, w)")
    if any(stride > crop for stride, crop in zip(test_cfg["stride"], test_cfg["crop_size"], strict=True)):
        raise ConfigError(f"model.test_cfg.stride={tuple(test_cfg['stride'])} of {experiment.path} is larger than crop_size={tuple(test_cfg['crop_size'])}, "
                          f"which leaves pixels without a prediction; use a stride of about two thirds of the crop")


def check_sample(model: nn.Module, sample: Mapping[str, Any]) -> None:
    """A training image as the pipeline hands it over must hold what the model's `forward_train` takes, maps of its size, and be whole patches. Raises ConfigError."""
    try:
        inspect.signature(model.forward_train).bind(**sample)
    except TypeError as error:
        raise ConfigError(f"the pipeline of data.train hands over {', '.join(sorted(sample))}, which {type(model).__name__} cannot train on: {error}; its Collect must "
                          "name what is missing, made by a step before it, and nothing else") from None
    patch, (_, height, width) = patch_size(model.backbone), _image_shape(sample)
    for name, value in sample.items():
        value = value.data if isinstance(value, DataContainer) else value
        if isinstance(value, torch.Tensor) and value.dim() > 1 and tuple(value.shape[-2:]) != (height, width):
            raise ConfigError(f"{name} of the first image of data.train comes out of the pipeline with {value.shape[-2]} x {value.shape[-1]} pixels, and the image with "
                              f"{height} x {width}; make it after the last step that resizes, crops or pads")
    if height % patch or width % patch:
        raise ConfigError(f"the first image of data.train comes out of its pipeline with {height} x {width} pixels, which are no whole patches of {patch}; "
                          f"crop and pad to a multiple of {patch}")


def describe(plan: Plan, console: Console) -> None:
    """Prints what `--dry-run` shows: parameters by part, groups, batches, and the memory of a process."""
    counts = Table("part", "parameters", "of which train", title=f"{plan.experiment.name}: model")
    for name, child in [*plan.meta_model.named_children(), ("all", plan.meta_model)]:
        params = list(child.parameters())
        counts.add_row(name, f"{sum(p.numel() for p in params):,}", f"{sum(p.numel() for p in params if p.requires_grad):,}")
    console.print(counts)
    groups = Table("group", "tensors", "parameters", "lr", "weight decay", title="parameter groups")
    for group in parameter_groups(plan.meta_model, plan.experiment.optimizer):
        groups.add_row(group["name"], str(len(group["params"])), f"{sum(p.numel() for p in group['params']):,}", f"{group['lr']:.3g}", f"{group['weight_decay']:g}")
    console.print(groups)
    ds, experiment = plan.ds, plan.experiment
    console.print(f"batch: {ds.global_batch} images per step = {ds.world_size} processes x {ds.micro_batch} images x {ds.accumulation} accumulation steps")
    console.print(f"data: {len(plan.train_set):,} training images, {len(plan.val_set) if plan.val_set is not None else 0:,} validation images; "
                  f"{experiment.max_steps:,} steps = {experiment.max_steps * ds.global_batch / len(plan.train_set):.1f} epochs")
    try:
        memory = of_this_run(Planner(experiment, plan.meta_model, crop=plan.crop), ds, plan.world, validate=plan.val_set is not None)
    except Exception as error:  # an odd model is no reason not to train it
        console.print(f"the memory of this run cannot be planned: {type(error).__name__}: {error}")
        return
    console.print(memory_table(memory, f"{ds.source}: ZeRO-{ds.stage}, {ds.precision}, {ds.world_size} process{'es' * (ds.world_size > 1)}"))
    console.print(f"Recomputed in the backbone: {memory.planner.recomputation}.")
    console.print(f"{verdict(memory)} {memory.footprint.checkpoint / 2**30:.3g} GiB on disk per checkpoint.")
    console.print("planned, not measured; nothing was taken from any accelerator. launch/plan.py compares ds_configs, GPUs and their numbers")
