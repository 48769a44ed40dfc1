"""The data sets of a run, built and held against its model, its losses and each other."""

import copy
from typing import Any

from mmseg.datasets import CustomDataset
from torch import nn
from torch.utils.data import ConcatDataset

from internseg_ds.config.experiment import Experiment
from internseg_ds.config.sections import split_score
from internseg_ds.data.checks.duplicates import compare_files
from internseg_ds.data.checks.normalization import compare_normalization
from internseg_ds.data.checks.pipeline_steps import odd_steps
from internseg_ds.data.checks.zero_labels import compare_zero_labels
from internseg_ds.data.dataset_parts import SegmentationDataset, parts, pipelines, plain_parts
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.entries import has_label_maps, leaf_datasets, leave_out_label_maps
from internseg_ds.data.folders.dataset import FolderDataset
from internseg_ds.data.joined import wrapper_in
from internseg_ds.data.samples import first_sample
from internseg_ds.errors import ConfigError, DataError
from internseg_ds.preflight.loss_checks import check_losses
from internseg_ds.preflight.model_checks import (
    check_channels,
    check_classes,
    check_sample,
    check_thresholds,
    compare_classes,
)

TOLERATED = 8
"""Damaged images at the start of a validation set, which an evaluation will leave out, that are no reason to
think its pipeline wrong."""


def training_set(experiment: Experiment, model: nn.Module) -> tuple[SegmentationDataset, list[str]]:
    """The training set, and warnings about it. model: on the meta device.

    Raises DataError where it is missing or empty, ConfigError where it does not fit the model or its losses.
    """
    dataset = build_datasets(experiment.train, "data.train")
    check_annotated(dataset)
    warnings = check_classes(model, dataset, "data.train") + check_thresholds(model)
    for steps in pipelines(dataset):
        warnings += odd_steps(steps, "data.train", evaluates=False)
    warnings += check_losses(model, experiment.train, ignored_labels(dataset), experiment.path)
    return dataset, warnings


def check_annotated(dataset: SegmentationDataset) -> None:
    """Raises DataError where a data set that is trained on has no label maps at all."""
    for part in plain_parts(dataset):
        if (
            isinstance(part, CustomDataset)
            and type(part).get_ann_info is CustomDataset.get_ann_info
            and not any("ann" in info for info in part.img_infos)
        ):
            option = "masks" if isinstance(part, FolderDataset) else "ann_dir"
            raise DataError(
                f"data.train: {type(part).__name__} of {part.img_dir} has no label maps, so nothing can be learnt from "
                f"it; its {option} says where they are"
            )


def ignored_labels(dataset: SegmentationDataset) -> list[int]:
    """The `ignore_index` of each data set in it."""
    return sorted({getattr(part, "ignore_index", 255) for part in plain_parts(dataset)})


def training_samples(
    experiment: Experiment, dataset: SegmentationDataset, model: nn.Module
) -> list[dict[str, Any]]:
    """The first sample of each part of the training set, as its pipeline hands it over. Raises DataError
    where none can be read, ConfigError where the model cannot train on one."""
    tolerated = experiment.engine.max_data_faults
    samples = [first_sample(part, "data.train", tolerated=tolerated) for part in parts(dataset)]
    for sample in samples:
        check_sample(model, sample)
    return samples


def checked_validation_set(
    experiment: Experiment, train_set: SegmentationDataset, model: nn.Module
) -> tuple[SegmentationDataset, list[str]]:
    """The validation set, and warnings about it and about how it differs from the training set. Raises
    DataError and ConfigError as `validation_set` does, and where its classes are not those that are
    trained."""
    dataset = validation_set(experiment)
    check_classes(model, dataset, "data.val")
    for steps in pipelines(dataset):
        check_channels(model, steps, "data.val")
    first_sample(dataset, "data.val", tolerated=TOLERATED)
    warnings = compare_classes(train_set, dataset)
    warnings += compare_zero_labels(experiment.train, dataset, "data.val")
    warnings += compare_normalization(train_set, dataset)
    warnings += compare_files(train_set, dataset, "data.val")
    warnings += odd_about(dataset, "data.val")
    _check_best_by(experiment, dataset)
    return dataset, warnings


def _check_best_by(experiment: Experiment, val_set: SegmentationDataset) -> None:
    """A score of one of several validation sets must be there. Raises ConfigError."""
    number, score = split_score(experiment.evaluation.best_by or "")
    count = len(val_set.datasets) if isinstance(val_set, ConcatDataset) else 1
    if number is not None and (count == 1 or number >= count):
        there = (
            f"data.val joins {count} data sets, numbered from 0"
            if count > 1
            else "data.val is a single data set"
        )
        raise ConfigError(
            f"evaluation.save_best={experiment.evaluation.best_by!r} of {experiment.path}: {there}; write "
            f"save_best={score!r} for the score of all"
        )


def odd_about(dataset: SegmentationDataset, what: str) -> list[str]:
    """Warnings about what can hardly be meant of a data set that is scored; what: its name."""
    warnings = [line for steps in pipelines(dataset) for line in odd_steps(steps, what, evaluates=True)]
    for part in plain_parts(dataset):
        if isinstance(part, CustomDataset) and type(part).pre_eval is not CustomDataset.pre_eval:
            warnings.append(
                f"{type(part).__name__} has a pre_eval of its own, which is not called: pixels are counted "
                "here, and its evaluate makes scores of them"
            )
        if 0 <= getattr(part, "ignore_index", 255) < len(part.CLASSES):
            warnings.append(
                f"ignore_index={part.ignore_index} of {what} is a class "
                f"({part.CLASSES[part.ignore_index]}), whose pixels are left out of all scores"
            )
    return sorted(set(warnings))


def validation_set(experiment: Experiment, split: str = "val", *, truth: bool = True) -> SegmentationDataset:
    """The data set that is evaluated on, in test mode, or several joined (`JoinedDatasets`); split: "val" or
    "test".

    truth: whether there must be label maps; without, none is looked for.
    Raises DataError when it is missing or empty, ConfigError when its images are repeated or mixed.
    """
    entry = experiment.test if split == "test" else experiment.val
    if entry is None:
        raise DataError(
            f"{experiment.path}: data has neither a 'val' nor a 'test' entry to evaluate on; add one, or "
            "train with --no-validate"
        )
    if wrapper := wrapper_in(entry):
        raise ConfigError(
            f"data.{split} of {experiment.path} is a {wrapper} of a data set, but an evaluation scores "
            "each image once, as it is; "
            "give it the data set inside"
        )
    if not truth:
        entry = copy.deepcopy(entry)
        for leaf in leaf_datasets(entry):
            leave_out_label_maps(leaf)
    if truth and not all(map(has_label_maps, leaf_datasets(entry))):
        raise ConfigError(
            f"data.{split} of {experiment.path} has no ann_dir (FolderDataset: masks), so there is no "
            "ground truth to score against; set it (or train with "
            "--no-validate, or write labels with launch/test.py --format-only DIR)"
        )
    return build_datasets(entry, f"data.{split}", test_mode=True)
