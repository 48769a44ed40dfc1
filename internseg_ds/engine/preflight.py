"""All that can be refused before any accelerator memory is taken is refused here: config, ds_config, model, data, names and shapes of weights.

In: what the user gave. Out: a `Plan`, from which `SegmentorEngine` is built and which `--dry-run` prints. Runs on every rank alike and talks to no other.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmseg.datasets import CustomDataset
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from internseg_ds.checkpoints.fitting import Fit
from internseg_ds.data.datasets import build_datasets, first_sample, parts, pipelines, plain_parts
from internseg_ds.data.joined import wrapper_in
from internseg_ds.data.normalization import check_normalization, compare_normalization
from internseg_ds.data.pipeline_steps import odd_steps
from internseg_ds.data.survey import compare_zero_labels, survey
from internseg_ds.distributed.construction import build_on_meta, choose_recomputation, freeze_parts
from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.distributed.optimizers import check_optimizer
from internseg_ds.distributed.parameter_groups import (
    default_weight_decay,
    named_groups,
    parameter_groups,
    unmatched_custom_keys,
)
from internseg_ds.distributed.precision import backbone_dtype, heads_dtype
from internseg_ds.distributed.process_group import World
from internseg_ds.engine.config_text import config_text
from internseg_ds.engine.experiment import Experiment, leaf_datasets
from internseg_ds.engine.loss_checks import check_losses
from internseg_ds.engine.loss_trial import try_losses
from internseg_ds.engine.model_checks import (
    check_classes,
    check_forward,
    check_patches,
    check_sample,
    check_thresholds,
    check_windows,
    compare_classes,
    image_shape,
)
from internseg_ds.engine.planner import ds_config_of
from internseg_ds.engine.resumed_settings import changed_settings, check_same_classes
from internseg_ds.engine.resuming import check_resumable
from internseg_ds.engine.starting_weights import check_starting_classes, starting_weights
from internseg_ds.engine.trackers import check_trackers
from internseg_ds.errors import ConfigError, DataError, shortened
from internseg_ds.models.blocks import odd_blocks

TOLERATED = 8
"""Damaged images at the start of a validation set, which an evaluation will leave out, that are no reason to think its pipeline wrong."""


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check. meta_model: the segmentor on the meta device, for shapes and names. crop: height and width of a training image.

    weights: what a fresh run loads; None for random weights, and for a run that goes on from the checkpoint `resume_from`. warnings: what is odd about the
    data, on the main rank.
    """

    experiment: Experiment
    ds: DsConfig
    world: World
    meta_model: nn.Module
    weights: Fit | None
    resume_from: Path | None
    crop: tuple[int, int]
    train_set: Dataset
    val_set: Dataset | None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What the log of the run is to say of these checks."""


def check(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    world: World,
    *,
    validate: bool = True,
    load_from: str | os.PathLike | None = None,
    resume_from: Path | None = None,
) -> Plan:
    """Raises UserError (ConfigError, DataError, CheckpointError) with one sentence for whatever cannot work.

    validate: whether the run will evaluate, and so needs the validation set. resume_from: the checkpoint that it goes on from; it needs no other weights.
    """
    meta_model = build_on_meta(experiment.model)
    choose_recomputation(meta_model, experiment.engine.recomputation)
    freeze_parts(meta_model, experiment.engine.freeze)
    ds = ds_config_of(
        experiment,
        ds_config,
        meta_model,
        world.size,
        global_batch=experiment.engine.global_batch,
        accumulation=experiment.accumulation,
    )
    if ds.stage == 0:
        raise ConfigError(
            f'{ds.source} names no ZeRO stage; write "zero_optimization": {{"stage": 3}} (or 1, 2), or take one of ds_configs/'
        )
    backbone_dtype(experiment.engine.backbone_dtype, world.device, ds.precision)
    heads_dtype(experiment.engine.heads_dtype, meta_model, ds.precision)
    check_offload(experiment, ds, resume_from)
    check_node_local(ds, world)
    groups = parameter_groups(meta_model, experiment.optimizer)
    check_optimizer(experiment.optimizer, ds)
    check_windows(experiment)
    check_patches(experiment, meta_model)
    weights = starting_weights(experiment, meta_model, load_from) if resume_from is None else None
    saved: Mapping[str, Any] = {}
    if resume_from is not None:
        saved = check_resumable(
            resume_from, meta_model, named_groups(meta_model, groups), check=experiment.engine.checksums
        )
    if world.is_main:
        check_trackers(experiment.log_hooks)
    train_set = build_datasets(experiment.train, "data.train", list(leaf_datasets(experiment.train)))
    check_normalization(train_set, "data.train")
    warnings = check_classes(meta_model, train_set, "data.train") + check_thresholds(meta_model)
    for steps in pipelines(train_set):
        warnings += odd_steps(steps, "data.train", evaluates=False)
    changed: list[str] = []
    if resume_from is not None:
        changed += changed_settings(saved.get("config"), config_text(experiment.cfg._cfg_dict.to_dict()))
        changed += check_same_classes(resume_from, saved.get("CLASSES"), train_set.CLASSES)
    elif weights is not None:
        warnings += check_starting_classes(
            meta_model, weights, train_set.CLASSES, experiment.engine.weights_may_differ
        )
    ignored = sorted({getattr(part, "ignore_index", 255) for part in plain_parts(train_set)})
    warnings += check_losses(meta_model, experiment.train, ignored, experiment.path)
    first, *others = [
        first_sample(part, "data.train", tolerated=experiment.engine.max_data_faults)
        for part in parts(train_set)
    ]
    for sample in (first, *others):
        check_sample(meta_model, sample)
    leaf_classes = ds.raw["zero_optimization"].get("leaf_module", {}).get("classes", ())
    with odd_blocks(meta_model, leaf_classes) as odd:
        outputs, unchecked = check_forward(meta_model, first, ds.micro_batch, world.size)
    notes = [*changed, *unmatched_custom_keys(meta_model, experiment.optimizer)]
    if "weight_decay" not in experiment.optimizer:
        notes.append(
            f"optimizer.weight_decay is not set: it is {default_weight_decay(experiment.optimizer):g}, the optimizer's own default"
        )
    notes += [unchecked] if unchecked else []
    if odd or (unchecked and leaf_classes):
        ds = ds.without_leaf_modules()
        why = (
            f"{shortened(sorted(odd))} takes or returns no single tensor, or runs twice"
            if odd
            else "nothing is known of what these take and return"
        )
        notes.append(f"ZeRO-3's hooks are on layers, not on blocks: {why}")
    frozen = sum(param.numel() for param in meta_model.parameters() if not param.requires_grad)
    if frozen and ds.param_dtype == torch.bfloat16:
        notes.append(
            f"{frozen:,} parameters are frozen: they are kept and saved in bf16, in which the model computes with them; only what trains has fp32 "
            "masters"
        )
    warnings += try_losses(outputs, len(train_set.CLASSES), ignored, ds.micro_batch)
    val_set = None
    if validate:
        val_set = validation_set(experiment)
        check_normalization(val_set, "data.val")
        check_classes(meta_model, val_set, "data.val")
        first_sample(val_set, "data.val", tolerated=TOLERATED)
        warnings += compare_classes(train_set, val_set)
        warnings += compare_zero_labels(list(leaf_datasets(experiment.train)), val_set, "data.val")
        warnings += compare_normalization(train_set, val_set) + odd_about(val_set, "data.val")
        _check_best_by(experiment, val_set)
    if world.is_main:
        warnings += survey(
            train_set, "data.train", training=True, tolerated=experiment.engine.max_data_faults
        )
        warnings += survey(val_set, "data.val", training=False) if val_set is not None else []
    return Plan(
        experiment,
        ds,
        world,
        meta_model,
        weights,
        resume_from,
        image_shape(first)[1:],
        train_set,
        val_set,
        tuple(warnings),
        tuple(notes),
    )


def _check_best_by(experiment: Experiment, val_set: Dataset) -> None:
    """A score of one of several validation sets must be there. Raises ConfigError."""
    number, _, of_one = (experiment.best_by or "").partition("_")
    count = len(val_set.datasets) if isinstance(val_set, ConcatDataset) else 1
    if of_one and number.isdecimal() and (count == 1 or int(number) >= count):
        there = (
            f"data.val joins {count} data sets, numbered from 0"
            if count > 1
            else "data.val is a single data set"
        )
        raise ConfigError(
            f"evaluation.save_best={experiment.best_by!r} of {experiment.path}: {there}; write save_best={of_one!r} for the score of all"
        )


def odd_about(dataset: Dataset, what: str) -> list[str]:
    """Sentences about what can hardly be meant of a data set that is scored; what: its name."""
    said = [sentence for steps in pipelines(dataset) for sentence in odd_steps(steps, what, evaluates=True)]
    for part in plain_parts(dataset):
        if isinstance(part, CustomDataset) and type(part).pre_eval is not CustomDataset.pre_eval:
            said.append(
                f"{type(part).__name__} has a pre_eval of its own, which is not called: pixels are counted here, and its evaluate makes scores of them"
            )
        if 0 <= getattr(part, "ignore_index", 255) < len(part.CLASSES):
            said.append(
                f"ignore_index={part.ignore_index} of {what} is a class ({part.CLASSES[part.ignore_index]}), whose pixels are left out of all scores"
            )
    return sorted(set(said))


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
    """DeepSpeed names node-local files by LOCAL_RANK, which must be the number of the GPU too: where each process sees a GPU 0 alone, it cannot be."""
    if (
        (ds.raw.get("checkpoint") or {}).get("use_node_local_storage")
        and world.device.type == "cuda"
        and world.device.index != world.local_rank
    ):
        raise ConfigError(
            f"checkpoint.use_node_local_storage of {ds.source} cannot work where srun shows each process one GPU alone: "
            "start with --gpus-per-node in place of --gpus-per-task, or add --gpu-bind=none"
        )


def validation_set(experiment: Experiment, split: str = "val", *, truth: bool = True) -> Dataset:
    """The data set that is evaluated on, in test mode, or several joined (`JoinedDatasets`); split: "val" or "test".

    truth: whether there must be label maps; without, none is looked for.
    Raises DataError when it is missing or empty, ConfigError when its images are repeated or mixed.
    """
    entry = experiment.test if split == "test" else experiment.val
    if entry is None:
        raise DataError(
            f"{experiment.path}: data has neither a 'val' nor a 'test' entry to evaluate on; add one, or train with --no-validate"
        )
    if wrapper := wrapper_in(entry):
        raise ConfigError(
            f"data.{split} of {experiment.path} is a {wrapper} of a data set, but an evaluation scores each image once, as it is; "
            "give it the data set inside"
        )
    if not truth:
        entry = copy.deepcopy(entry)
        for leaf in leaf_datasets(entry):
            leaf["ann_dir"] = None
    leaves = list(leaf_datasets(entry))
    if truth and any(leaf.get("ann_dir") is None for leaf in leaves):
        raise ConfigError(
            f"data.{split} of {experiment.path} has no ann_dir, so there is no ground truth to score against; set it (or train with "
            "--no-validate, or write labels with launch/test.py --format-only DIR)"
        )
    return build_datasets(entry, f"data.{split}", leaves, test_mode=True)
