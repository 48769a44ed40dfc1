"""All that can be refused before any accelerator memory is taken is refused here: config, ds_config, model,
data, names and shapes of weights.

In: what the user gave. Out: a `Plan`, from which `SegmentorEngine` is built and which `--dry-run` prints.
Runs on every rank alike and talks to no other.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from internseg_ds.checkpoints.key_matching import KeyMatch
from internseg_ds.config.config_text import config_dict, config_text
from internseg_ds.config.ds_config import DsConfig
from internseg_ds.config.experiment import Experiment
from internseg_ds.data.checks.normalization import compare_with_pretraining
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.distributed.construction import build_on_meta, choose_trained, set_activation_checkpointing
from internseg_ds.distributed.process_group import World
from internseg_ds.distributed.zero_internals import leaf_class_names
from internseg_ds.errors import shortened
from internseg_ds.models.repeated_blocks import unhookable_blocks
from internseg_ds.models.tuning import TuningMode
from internseg_ds.preflight.dataset_checks import (
    checked_validation_set,
    ignored_labels,
    training_samples,
    training_set,
)
from internseg_ds.preflight.loss_trial import try_losses
from internseg_ds.preflight.model_checks import check_forward, image_shape
from internseg_ds.preflight.settings_checks import check_settings, settings_notes
from internseg_ds.preflight.starting_weights import check_starting_classes, starting_weights
from internseg_ds.preflight.tuning_checks import calls_of, check_tuned_parts


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check. meta_model: the segmentor on the meta device, for shapes and names.
    crop: height and width of a training image.

    weights: what a fresh run loads; None for random weights, and for a run that goes on from the checkpoint
    `resume_from`. warnings: what is odd about the data, on the main rank.
    """

    experiment: Experiment
    ds: DsConfig
    world: World
    meta_model: nn.Module
    weights: KeyMatch | None
    resume_from: Path | None
    crop: tuple[int, int]
    train_set: SegmentationDataset
    val_set: SegmentationDataset | None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What the log of the run is to say of these checks."""

    @property
    def config_text(self) -> str:
        """The experiment as one config file, by which the model is built without the files of its weights."""
        cfg = config_dict(self.experiment.cfg)
        cfg["model"]["backbone"] |= getattr(self.meta_model.backbone, "stated", {})
        return config_text(cfg)


def check(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    world: World,
    *,
    validate: bool = True,
    load_from: str | os.PathLike | None = None,
    resume_from: Path | None = None,
) -> Plan:
    """Checks all that can be checked without an accelerator and without other processes, and on every rank
    alike; `survey_data` then looks at files.

    validate: whether the run will evaluate, and so needs the validation set. resume_from: the checkpoint that
    it goes on from; it needs no other weights. Raises UserError (ConfigError, DataError, CheckpointError) with
    one message for whatever cannot work.
    """
    model = build_on_meta(experiment.model)
    set_activation_checkpointing(model, experiment.engine.recomputation)
    choose_trained(model, experiment.engine)
    ds = check_settings(experiment, ds_config, model, world, resume_from)
    weights = starting_weights(experiment, model, load_from) if resume_from is None else None
    train_set, warnings = training_set(experiment, model)
    # the last images of an epoch that make no whole batch begin the next one; mmseg's loader drops them
    experiment = experiment.in_steps(max(1, len(train_set) // ds.global_batch))
    backbone: Any = model.backbone
    warnings += compare_with_pretraining(train_set, getattr(backbone, "normalizations", ()))
    classes = train_set.CLASSES
    if weights is not None:
        warnings += check_starting_classes(model, weights, classes, experiment.engine.weights_may_differ)
    sample, *_ = training_samples(experiment, train_set, model)
    passed = _pass_forward(model, sample, ds, world, experiment.engine.tune)
    notes = settings_notes(experiment, ds, model) + passed.notes
    warnings += try_losses(passed.outputs, len(classes), ignored_labels(train_set), ds.micro_batch)
    val_set: SegmentationDataset | None = None
    if validate:
        val_set, about_validation = checked_validation_set(experiment, train_set, model)
        warnings += about_validation
    return Plan(
        experiment,
        passed.ds,
        world,
        model,
        weights,
        resume_from,
        image_shape(sample)[1:],
        train_set,
        val_set,
        tuple(warnings),
        tuple(notes),
    )


def survey_data(plan: Plan) -> Plan:
    """The plan with warnings about some files of its data sets. Only the main rank looks: whatever all ranks
    refuse for must be found before, or they would wait for it.

    Raises DataError and ConfigError for data that cannot be meant.
    """
    if not plan.world.is_main:
        return plan
    tolerated = plan.experiment.engine.max_data_faults
    warnings = survey(plan.train_set, "data.train", training=True, tolerated=tolerated)
    if plan.val_set is not None:
        warnings += survey(plan.val_set, "data.val", training=False)
    return replace(plan, warnings=(*plan.warnings, *warnings))


@dataclass(frozen=True)
class _Passed:
    """outputs: what each head put out, with the head. ds: with ZeRO-3's hooks where they can be."""

    outputs: list[tuple[nn.Module, Any]]
    ds: DsConfig
    notes: list[str]


def _pass_forward(
    model: nn.Module, sample: Mapping[str, Any], ds: DsConfig, world: World, mode: TuningMode
) -> _Passed:
    """Runs a forward pass on the meta device; it shows, too, whether ZeRO-3 can have its hooks on blocks.
    Raises ConfigError where the pass fails, or does not reach what `engine.tune` trains."""
    leaf_classes = ds.raw["zero_optimization"].get("leaf_module", {}).get("classes", ())
    with unhookable_blocks(model, leaf_classes) as unhookable, calls_of(model) as called:
        outputs, unchecked = check_forward(model, sample, ds.micro_batch, world.size)
    if not unchecked:
        check_tuned_parts(model, mode, called)
    notes = [unchecked] if unchecked else []
    names = {name for module in model.modules() for name in leaf_class_names(type(module))}
    if absent := [name for name in leaf_classes if name not in names]:
        notes.append(
            f"zero_optimization.leaf_module.classes of the ds_config names {shortened(absent)}, of which this "
            'model has no module; "auto" takes the block of any backbone'
        )
    if unhookable:
        why = f"{shortened(sorted(unhookable))} takes or returns no single tensor, or runs twice"
    elif unchecked and leaf_classes:
        why = "nothing is known of what these take and return"
    else:
        return _Passed(outputs, ds, notes)
    notes.append(f"ZeRO-3's hooks are on layers, not on blocks: {why}")
    return _Passed(outputs, ds.without_leaf_modules(), notes)
