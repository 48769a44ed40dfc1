"""The experiment config, read once at the border: an mmcv Config in, a frozen `Experiment` out. Below this
nobody calls `cfg.get`.

Published configs of MMSegmentation 0.x, InternVL and InternImage are read as they stand. What mmcv's runner
did and the engine does itself is interpreted; a key that has no effect here becomes one line in
`Experiment.notes`, which the run logs. Loads no DeepSpeed and no model.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcv import Config, ConfigDict

from internseg_ds.config.cfg_options import check_option
from internseg_ds.config.config_file import load_config
from internseg_ds.config.config_variables import unused_crop_size, unused_variables
from internseg_ds.config.engine_options import EngineOptions, read_options, whole_number
from internseg_ds.config.known_keys import OPTIONAL, READ, REPLACED, SECTIONS
from internseg_ds.config.lr_schedule import LrSchedule, counts_epochs, read_schedule, schedule_warnings
from internseg_ds.config.section_keys import hook_notes, near_misses, section_notes
from internseg_ds.config.sections import (
    CheckpointSettings,
    EvaluationSettings,
    GradientSettings,
    LoggingSettings,
    read_checkpoints,
    read_evaluation,
    read_gradient,
    read_logging,
)
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.errors import ConfigError, short_repr


@dataclass(frozen=True)
class Experiment:
    """One training or test run as its config describes it. Steps are optimizer updates, batches are in
    images."""

    path: str
    cfg: Config
    model: ConfigDict
    train: ConfigDict | list[ConfigDict]
    val: ConfigDict | None
    test: ConfigDict | None
    """The data sets of `data`; `val` and `test` stand in for each other where one is missing."""
    micro_batch: int
    workers: int
    optimizer: ConfigDict
    schedule: LrSchedule
    gradient: GradientSettings
    evaluation: EvaluationSettings
    checkpoints: CheckpointSettings
    logging: LoggingSettings
    engine: EngineOptions
    cudnn_benchmark: bool
    load_from: str | None
    resume_from: str | None
    """A checkpoint to go on from, or "auto" (`auto_resume`): the newest of the work directory, if there is
    any."""
    work_dir: Path
    """Where its results go when nobody says otherwise."""
    seed: int
    notes: tuple[str, ...] = ()
    """What has no effect here, and why."""
    warnings: tuple[str, ...] = ()
    counts_epochs: bool = False
    """Whether steps are epochs as yet, as the config counts them: `max_steps`, and the intervals of
    evaluation and checkpoints that are by epoch. `in_steps` makes them steps."""

    def in_steps(self, steps_per_epoch: int) -> "Experiment":
        """The experiment with epochs of so many steps, where it counts epochs; else as it is."""
        if not self.counts_epochs:
            return self

        def steps_of(interval: int, section: str) -> int:
            by_epoch = (self.cfg.get(section) or {}).get("by_epoch", True)
            return interval * steps_per_epoch if by_epoch and interval > 0 else interval

        evaluation, checkpoints = self.evaluation, self.checkpoints
        schedule = self.schedule.with_epochs_of(steps_per_epoch)
        return replace(
            self,
            schedule=schedule,
            evaluation=replace(evaluation, interval=steps_of(evaluation.interval, "evaluation")),
            checkpoints=replace(checkpoints, interval=steps_of(checkpoints.interval, "checkpoint_config")),
            notes=(
                *self.notes,
                f"an epoch is {steps_per_epoch:,} steps, so the run has {schedule.max_steps:,}",
            ),
            warnings=(*self.warnings, *schedule.warmup_warning(self.path)),
            counts_epochs=False,
        )

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def max_steps(self) -> int:
        return self.schedule.max_steps


REQUIRED = ("model", "data", "optimizer", "lr_config", "runner")
OF_MMENGINE = ("optim_wrapper", "param_scheduler", "train_dataloader", "default_hooks", "val_evaluator")
"""Sections that MMSegmentation has since version 1."""


def read_experiment(
    config: str | os.PathLike | Config, cfg_options: Mapping[str, Any] | None = None
) -> Experiment:
    """Reads a config file (or an mmcv Config) and applies `--cfg-options`.

    Raises ConfigError for a missing or broken file, an option path that exists nowhere, an unknown key of
    `engine`, and whatever the engine cannot run (a policy without a rate for each step, say).
    """
    path, cfg = load_config(config)
    for option, value in (cfg_options or {}).items():
        check_option(cfg, option, path)
        cfg.merge_from_dict({option: value})
    if "runner" not in cfg:
        _add_runner(cfg, path)
    _check_sections(cfg, path)
    _check_data(cfg.data, path)
    notes = [*_notes(cfg), *section_notes(cfg, path)]
    schedule = read_schedule(cfg, path)
    if not counts_epochs(cfg) and any(
        (cfg.get(key) or {}).get("by_epoch") for key in ("checkpoint_config", "evaluation")
    ):
        notes.append("by_epoch is taken as False: the runner counts steps, and so do the intervals")
    _check_flags(cfg, path)
    engine = read_options(cfg.get("engine") or {}, path)
    gradient = read_gradient(cfg, path)
    _check_one_accumulation(engine, gradient, path)
    logging = read_logging(cfg, path)
    val, test = cfg.data.get("val"), cfg.data.get("test")
    return Experiment(
        path=path,
        cfg=cfg,
        model=cfg.model,
        train=cfg.data.train,
        val=val or test,
        test=test or val,
        micro_batch=_of_loader(cfg.data, "samples_per_gpu", path, least=1),
        workers=_of_loader(cfg.data, "workers_per_gpu", path, least=0),
        optimizer=cfg.optimizer,
        schedule=schedule,
        gradient=gradient,
        evaluation=read_evaluation(cfg, schedule.max_steps, path),
        checkpoints=read_checkpoints(cfg, schedule.max_steps, path),
        logging=logging,
        engine=engine,
        cudnn_benchmark=bool(cfg.get("cudnn_benchmark", False)),
        load_from=_path(cfg, "load_from", path),
        resume_from=_path(cfg, "resume_from", path) or ("auto" if cfg.get("auto_resume") else None),
        work_dir=Path(_path(cfg, "work_dir", path) or Path("work_dirs") / Path(path).stem),
        seed=whole_number(cfg.get("seed") or 0, f"seed of {path}", least=0),
        notes=(*notes, *hook_notes(logging.hooks, logging.interval, path)),
        warnings=(
            *near_misses(cfg, path),
            *unused_crop_size(cfg, path),
            *unused_variables(cfg, path),
            *schedule_warnings(cfg.lr_config, cfg.optimizer.get("lr"), schedule, path),
        ),
        counts_epochs=counts_epochs(cfg),
    )


def _add_runner(cfg: Config, path: str) -> None:
    """The `runner` of an old config, as mmseg's own training reads it. Raises ConfigError for two lengths."""
    if "total_iters" in cfg and "total_epochs" in cfg:
        raise ConfigError(
            f"{path} has total_iters={cfg.total_iters!r} and total_epochs={cfg.total_epochs!r}, and a run has "
            "one length; leave out one of them"
        )
    if "total_iters" in cfg:
        cfg.runner = dict(type="IterBasedRunner", max_iters=cfg.total_iters)
    elif "total_epochs" in cfg:
        cfg.runner = dict(type="EpochBasedRunner", max_epochs=cfg.total_epochs)


def _check_sections(cfg: Config, path: str) -> None:
    """Raises ConfigError for a section that is missing, or is no dict."""
    for key in REQUIRED:
        if key not in cfg:
            raise _no_section(cfg, key, path)
    for key in SECTIONS:
        if not isinstance(cfg.get(key, {}), Mapping) and (key not in OPTIONAL or cfg[key] is not None):
            raise ConfigError(f"{key}={cfg[key]!r} of {path} must be a section dict(...)")


def _check_flags(cfg: Config, path: str) -> None:
    """Raises ConfigError for what is neither yes nor no where one of them is asked for."""
    sections = ("evaluation", "checkpoint_config", "lr_config")
    given = {name: cfg.get(name) for name in ("auto_resume", "cudnn_benchmark")}
    given |= {f"{section}.by_epoch": (cfg.get(section) or {}).get("by_epoch") for section in sections}
    for name, value in given.items():
        if value not in (True, False, None):
            raise ConfigError(f"{name}={value!r} of {path} must be True or False")


def _no_section(cfg: Config, key: str, path: str) -> ConfigError:
    hint = ""
    if newer := [name for name in OF_MMENGINE if name in cfg]:
        hint = (
            f"with {', '.join(newer)} it looks like a config of MMSegmentation 1.x, and 0.x is read "
            "here (0.30 is the last); "
        )
    own = [name for name in cfg if name not in READ]
    if near := difflib.get_close_matches(key, own, n=1, cutoff=0.75):
        hint = f"is {near[0]!r} meant to be it? "
    return ConfigError(f"{path} has no {key!r} section; {hint}take one of configs/ as an example")


def _notes(cfg: Config) -> Iterator[str]:
    """What has no effect at the top of a config, and which data set or number of steps is taken."""
    for key, why in REPLACED.items():
        if cfg.get(key) is not None:
            yield f"{key} = {short_repr(cfg[key])} has no effect: {why}"
    if cfg.data.get("val") is None and cfg.data.get("test") is not None:
        yield "data.val is not set: data.test is evaluated on"
    for old, key in (("total_iters", "max_iters"), ("total_epochs", "max_epochs")):
        if old in cfg and cfg[old] != cfg.runner.get(key):
            yield (
                f"{old} = {short_repr(cfg[old])} has no effect: runner.{key} = {cfg.runner.get(key)} says how "
                "long a run is"
            )


def _check_one_accumulation(engine: EngineOptions, gradient: GradientSettings, path: str) -> None:
    if gradient.accumulation is not None and engine.global_batch is not None:
        raise ConfigError(
            f"{path} sets engine.global_batch={engine.global_batch} and "
            f"optimizer_config.cumulative_iters={gradient.accumulation}; keep one of them"
        )


def _of_loader(data: Mapping[str, Any], key: str, path: str, least: int) -> int:
    """A number that `data` or, before it, `data.train_dataloader` sets."""
    value = (data.get("train_dataloader") or {}).get(key, data.get(key, 2))
    return whole_number(value, f"data.{key} of {path}", least=least)


def _path(cfg: Config, key: str, path: str) -> str | None:
    value = cfg.get(key)
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ConfigError(f"{key} of {path} is {value!r}; it must be a path, or None")
    return os.fspath(value)


def _check_data(data: Mapping[str, Any], path: str) -> None:
    """The data sections must be dicts (or lists of them) with a pipeline, each data set inside wrappers
    too."""
    if data.get("train") is None:
        raise ConfigError(f"{path}: data has no 'train' entry")
    for split in ("train", "val", "test"):
        entry = data.get(split)
        if entry is None:
            continue
        if isinstance(entry, (list, tuple)) and not entry:
            raise ConfigError(f"data.{split} of {path} is an empty list; name a data set, or several")
        for leaf in leaf_datasets(entry):
            _check_data_set(leaf, split, path)


def _check_data_set(entry: Any, split: str, path: str) -> None:
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"data.{split} of {path} is {entry!r}; it must be a data set dict(type=..., pipeline=[...])"
        )
    pipeline = entry.get("pipeline")
    if not isinstance(pipeline, (list, tuple)) or not pipeline:
        raise ConfigError(f"data.{split}.pipeline={pipeline!r} of {path} must be a list of transforms")
    for key in ("data_root", "img_dir", "ann_dir"):
        value = entry.get(key)
        for folder in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(folder, (str, type(None))):
                raise ConfigError(f"data.{split}.{key}={value!r} of {path} must be a path")
