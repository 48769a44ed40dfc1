"""The experiment config, read once at the border: an mmcv Config in, a frozen `Experiment` out. Below this nobody calls `cfg.get`.

Published configs of MMSegmentation 0.x, InternVL and InternImage are read as they stand. What mmcv's runner did and the engine does itself is
interpreted; a key that has no effect here becomes one line in `Experiment.notes`, which the run logs. Loads no DeepSpeed and no model.
"""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcv import Config, ConfigDict
from mmcv.utils import import_modules_from_strings

from internseg_ds.distributed.lr_schedule import LrSchedule, arguments, policies, policy_name
from internseg_ds.engine.config_keys import KNOWN, OPTIONAL, READ, REPLACED, SECTIONS, check_option
from internseg_ds.engine.config_variables import unused_crop_size, unused_variables
from internseg_ds.engine.options import EngineOptions, read_options, whole_number
from internseg_ds.engine.section_keys import hook_notes, near_misses, section_notes
from internseg_ds.errors import ConfigError, reason_of, short_repr, unknown_key


@dataclass(frozen=True)
class Experiment:
    """One training or test run as its config describes it. Steps are optimizer updates, batches are in images."""

    path: str
    cfg: Config
    model: ConfigDict
    train: ConfigDict | list[ConfigDict]
    val: ConfigDict
    test: ConfigDict
    micro_batch: int
    workers: int
    optimizer: ConfigDict
    schedule: LrSchedule
    accumulation: int | None
    gradient_clipping: float
    save_every: int
    max_keep_ckpts: int
    evaluate_every: int
    metrics: tuple[str, ...]
    best_by: str | None
    """The score whose best checkpoint is kept, or None (`evaluation.save_best`)."""
    log_every: int
    log_hooks: tuple[ConfigDict, ...]
    log_level: str
    cudnn_benchmark: bool
    load_from: str | None
    resume_from: str | None
    """A checkpoint to go on from, or "auto" (`auto_resume`): the newest of the work directory, if there is any."""
    work_dir: Path
    """Where its results go when nobody says otherwise."""
    seed: int
    engine: EngineOptions
    notes: tuple[str, ...] = field(default=())
    """What has no effect here, and why."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def max_steps(self) -> int:
        return self.schedule.max_steps


OF_MMENGINE = ("optim_wrapper", "param_scheduler", "train_dataloader", "default_hooks", "val_evaluator")
"""Sections that MMSegmentation has since version 1."""
SCORES = {
    "mIoU": ("mIoU", "mAcc", "aAcc"),
    "mDice": ("mDice", "mAcc", "aAcc"),
    "mFscore": ("mFscore", "mPrecision", "mRecall", "aAcc"),
}
"""mmseg's metrics, and the scores over all classes that each comes with."""


def read_experiment(
    config: str | os.PathLike | Config, cfg_options: Mapping[str, Any] | None = None
) -> Experiment:
    """Reads a config file (or an mmcv Config) and applies `--cfg-options`.

    Raises ConfigError for a missing or broken file, an option path that exists nowhere, an unknown key of `engine`, and whatever the engine
    cannot run (an epoch-based runner, a schedule that is not poly).
    """
    path, cfg = _load(config)
    for option, value in (cfg_options or {}).items():
        check_option(cfg, option, path)
        cfg.merge_from_dict({option: value})
    if "runner" not in cfg and "total_iters" in cfg:  # as mmseg's own training reads old configs
        cfg.runner = dict(type="IterBasedRunner", max_iters=cfg.total_iters)
    for key in ("model", "data", "optimizer", "lr_config", "runner"):
        if key not in cfg:
            newer = [name for name in OF_MMENGINE if name in cfg]
            hint = (
                f"with {', '.join(newer)} it looks like a config of MMSegmentation 1.x, and 0.x is read here (0.30 is the last); "
                if newer
                else ""
            )
            near = difflib.get_close_matches(
                key, [name for name in cfg if name not in READ], n=1, cutoff=0.75
            )
            hint = f"is {near[0]!r} meant to be it? " if near else hint
            raise ConfigError(f"{path} has no {key!r} section; {hint}take one of configs/ as an example")
    for key in SECTIONS:
        if not isinstance(cfg.get(key, {}), Mapping) and (key not in OPTIONAL or cfg[key] is not None):
            raise ConfigError(f"{key}={cfg[key]!r} of {path} must be a section dict(...)")
    _check_data(cfg.data, path)
    notes = [
        f"{key} = {short_repr(cfg[key])} has no effect: {why}"
        for key, why in REPLACED.items()
        if cfg.get(key) is not None
    ]
    if cfg.data.get("val") is None and cfg.data.get("test") is not None:
        notes.append("data.val is not set: data.test is evaluated on")
    if cfg.get("total_iters", cfg.runner.get("max_iters")) != cfg.runner.get("max_iters"):
        notes.append(
            f"total_iters = {short_repr(cfg.total_iters)} has no effect: runner.max_iters = {cfg.runner.get('max_iters')} says how long a run is"
        )
    notes += section_notes(cfg, path)
    loader = {
        **{k: v for k, v in cfg.data.items() if k in ("samples_per_gpu", "workers_per_gpu")},
        **(cfg.data.get("train_dataloader") or {}),
    }
    val = cfg.data.get("val") or cfg.data.get("test")
    evaluation, saving, logging_ = (
        cfg.get(key) or {} for key in ("evaluation", "checkpoint_config", "log_config")
    )
    schedule = _schedule(cfg, path)
    if saving.get("by_epoch", False) or evaluation.get("by_epoch", False):
        notes.append("by_epoch is taken as False: intervals are in steps")
    optimizer_config = cfg.get("optimizer_config") or {}
    options = read_options(cfg.get("engine") or {}, path)
    cumulative = optimizer_config.get("cumulative_iters")
    if cumulative is not None:
        whole_number(cumulative, f"optimizer_config.cumulative_iters of {path}", least=1)
    if cumulative is not None and options.global_batch is not None:
        raise ConfigError(
            f"{path} sets engine.global_batch={options.global_batch} and optimizer_config.cumulative_iters={cumulative}; keep one of them"
        )
    hooks = (
        tuple(logging_.get("hooks") or ())
        if isinstance(logging_.get("hooks", ()), (list, tuple, type(None)))
        else (None,)
    )
    if not all(isinstance(hook, Mapping) and "type" in hook for hook in hooks):
        raise ConfigError(
            f"log_config.hooks={logging_['hooks']!r} of {path} must be a list of dict(type=...)"
        )
    metric = evaluation.get("metric", "mIoU")
    if not metric or not isinstance(metric, (str, list, tuple)):
        raise ConfigError(
            f"evaluation.metric={metric!r} of {path} names no metric; the metrics are {', '.join(SCORES)}"
        )
    metrics = known_metrics(
        (metric,) if isinstance(metric, str) else tuple(metric), f"evaluation.metric of {path}"
    )
    log_every = whole_number(logging_.get("interval", 50), f"log_config.interval of {path}", least=1)
    return Experiment(
        path=path,
        cfg=cfg,
        model=cfg.model,
        train=cfg.data.train,
        val=val,
        test=cfg.data.get("test") or val,
        micro_batch=whole_number(
            loader.get("samples_per_gpu", 2), f"data.samples_per_gpu of {path}", least=1
        ),
        workers=whole_number(loader.get("workers_per_gpu", 2), f"data.workers_per_gpu of {path}", least=0),
        optimizer=cfg.optimizer,
        schedule=schedule,
        accumulation=cumulative,
        gradient_clipping=_clipping(optimizer_config.get("grad_clip") or {}, path),
        save_every=whole_number(
            saving.get("interval", schedule.max_steps), f"checkpoint_config.interval of {path}", least=-1
        ),
        max_keep_ckpts=whole_number(
            saving.get("max_keep_ckpts", -1), f"checkpoint_config.max_keep_ckpts of {path}", least=-1
        ),
        evaluate_every=whole_number(
            evaluation.get("interval", schedule.max_steps), f"evaluation.interval of {path}", least=-1
        ),
        metrics=metrics,
        best_by=_best_by(evaluation.get("save_best"), metrics, path),
        log_every=log_every,
        log_hooks=hooks,
        log_level=_log_level(cfg.get("log_level", "INFO"), path),
        cudnn_benchmark=bool(cfg.get("cudnn_benchmark", False)),
        load_from=_path(cfg.get("load_from"), f"load_from of {path}"),
        resume_from=_path(cfg.get("resume_from"), f"resume_from of {path}")
        or ("auto" if cfg.get("auto_resume") else None),
        work_dir=Path(
            _path(cfg.get("work_dir"), f"work_dir of {path}") or Path("work_dirs") / Path(path).stem
        ),
        seed=whole_number(cfg.get("seed") or 0, f"seed of {path}", least=0),
        engine=options,
        notes=(*notes, *hook_notes(hooks, log_every, path)),
        warnings=(
            *near_misses(cfg, path),
            *unused_crop_size(cfg, path),
            *unused_variables(cfg, path),
            *_schedule_warnings(cfg.lr_config, cfg.optimizer.get("lr"), schedule.max_steps, path),
        ),
    )


def _path(value: Any, what: str) -> str | None:
    if value is not None and (not isinstance(value, (str, os.PathLike)) or not str(value)):
        raise ConfigError(f"{what} is {value!r}; it must be a path, or None")
    return value


def _check_data(data: Mapping[str, Any], path: str) -> None:
    """The data sections must be dicts (or lists of them) with a pipeline, each data set inside wrappers too."""
    for split in ("train", "val", "test"):
        if split == "train" and data.get(split) is None:
            raise ConfigError(f"{path}: data has no 'train' entry")
        if isinstance(data.get(split), (list, tuple)) and not data[split]:
            raise ConfigError(f"data.{split} of {path} is an empty list; name a data set, or several")
        for entry in leaf_datasets(data[split]) if data.get(split) is not None else ():
            if not isinstance(entry, Mapping):
                raise ConfigError(
                    f"data.{split} of {path} is {entry!r}; it must be a data set dict(type=..., pipeline=[...])"
                )
            if not isinstance(entry.get("pipeline"), (list, tuple)) or not entry["pipeline"]:
                raise ConfigError(
                    f"data.{split}.pipeline={entry.get('pipeline')!r} of {path} must be a list of transforms"
                )
            for key in ("data_root", "img_dir", "ann_dir"):
                folders = entry.get(key) if isinstance(entry.get(key), (list, tuple)) else [entry.get(key)]
                if not all(isinstance(folder, (str, type(None))) for folder in folders):
                    raise ConfigError(f"data.{split}.{key}={entry[key]!r} of {path} must be a path")


def _clipping(grad_clip: Any, path: str) -> float:
    if not isinstance(grad_clip, Mapping):
        raise ConfigError(f"optimizer_config.grad_clip={grad_clip!r} of {path} must be dict(max_norm=...)")
    for key in grad_clip:
        if key not in KNOWN["optimizer_config.grad_clip"]:
            raise unknown_key(
                key, KNOWN["optimizer_config.grad_clip"], f"optimizer_config.grad_clip of {path}"
            )
    norm, kind = grad_clip.get("max_norm", 0.0), grad_clip.get("norm_type", 2)
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or norm < 0 or kind != 2:
        raise ConfigError(
            f"optimizer_config.grad_clip={dict(grad_clip)} of {path}: max_norm must be a number of at least 0, "
            "and norm_type 2, the only one that DeepSpeed has"
        )
    return float(norm)


def known_metrics(metrics: tuple[str, ...], where: str) -> tuple[str, ...]:
    """`metrics` as they are. Raises ConfigError for one that mmseg does not have; where: what named it, for the message."""
    for metric in metrics:
        if metric not in SCORES:
            raise ConfigError(f"{where}: there is no metric {metric!r}; the metrics are {', '.join(SCORES)}")
    return metrics


def _best_by(save_best: Any, metrics: tuple[str, ...], path: str) -> str | None:
    if not save_best:
        return None
    if save_best in ("auto", True):
        return metrics[0]
    scores = [score for metric in metrics for score in SCORES[metric]]
    number, _, of_one = str(save_best).partition("_")  # "1_mIoU" of the second of several validation sets
    if save_best not in scores and not (number.isdecimal() and of_one in scores):
        raise ConfigError(
            f"evaluation.save_best={save_best!r} of {path} is no score of evaluation.metric={'/'.join(metrics)}; "
            f"there are {', '.join(scores)}, or 'auto'"
        )
    return save_best


def _log_level(level: Any, path: str) -> str:
    if not isinstance(level, str) or level not in logging.getLevelNamesMapping():
        raise ConfigError(f"log_level={level!r} of {path} is no level of logging; 'INFO' is the usual one")
    return level


def _load(config: str | os.PathLike | Config) -> tuple[str, Config]:
    if isinstance(config, Config):
        return config.filename or "config", Config(config._cfg_dict.to_dict(), filename=config.filename)
    if not Path(config).is_file():
        beside = {
            path.name: path for path in (*Path("configs").rglob("*.py"), *Path(config).parent.glob("*.py"))
        }
        near = difflib.get_close_matches(Path(config).name, beside, n=1, cutoff=0.75)
        raise ConfigError(
            f"there is no config file {config}"
            + (f"; did you mean {beside[near[0]]}?" if near else f" as seen from {Path.cwd()}")
        )
    import internseg_ds.data.datasets
    import internseg_ds.models  # noqa: F401 - registers ours before the config's imports register theirs: whoever has a name of ours is told so

    try:
        cfg = Config.fromfile(str(config), import_custom_modules=False)
    except Exception as error:  # a config is a program: whatever it raises, the user wrote it
        raise ConfigError(f"config {config} cannot be read: {reason_of(error)}") from error
    _import_modules(cfg.get("custom_imports") or {}, str(config))
    return str(config), cfg


def _import_modules(section: Mapping[str, Any], path: str) -> None:
    """Imports the modules of `custom_imports`, each by itself, so that the one at fault is named."""
    if not isinstance(section, Mapping) or not {*section} <= {"imports", "allow_failed_imports"}:
        raise ConfigError(
            f"custom_imports={section!r} of {path} must be dict(imports=[...], allow_failed_imports=False)"
        )
    names = section.get("imports") or []
    for name in [names] if isinstance(names, str) else names:
        try:
            import_modules_from_strings(name, allow_failed_imports=section.get("allow_failed_imports", False))
        except Exception as error:  # of somebody's module
            mend = "its folder must be on PYTHONPATH, or its package installed"
            if "already registered" in str(error):
                mend = "mmcv, mmseg or internseg_ds have a class of that name; leave the import out, rename yours, or register it with force=True"
            raise ConfigError(
                f"custom_imports of {path}: {name!r} cannot be imported: {reason_of(error)}; {mend}"
            ) from error


def _schedule(cfg: Config, path: str) -> LrSchedule:
    if cfg.runner.get("type", "IterBasedRunner") != "IterBasedRunner" or "max_iters" not in cfg.runner:
        raise ConfigError(
            f"runner = {dict(cfg.runner)} of {path}: steps are counted here, not epochs; "
            "write runner = dict(type='IterBasedRunner', max_iters=...)"
        )
    steps = whole_number(cfg.runner.max_iters, f"runner.max_iters of {path}", least=1)
    lr = {key: value for key, value in cfg.lr_config.items() if key != "policy"}
    policy, known = cfg.lr_config.get("policy", "poly"), policies()
    if not isinstance(policy, str) or policy_name(policy) not in known:
        raise ConfigError(
            f"lr_config.policy={policy!r} of {path} is not known here; the policies are {', '.join(known)}"
        )
    counted = policy_name(policy) != "Fixed"  # which has the same rate whatever is counted
    if (counted and lr.get("by_epoch", True)) or lr.get("warmup_by_epoch"):
        raise ConfigError(
            f"lr_config of {path} must have by_epoch=False (mmcv's default is True): steps are counted here, not epochs"
        )
    for key, value in lr.items():
        if key not in (names := arguments(policy)):
            raise unknown_key(key, names, f"lr_config with policy {policy!r} of {path}")
        if (
            key in ("power", "min_lr", "min_lr_ratio", "warmup_ratio", "warmup_iters", "gamma")
            and value is not None
            and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0)
        ):
            raise ConfigError(f"lr_config.{key}={value!r} of {path} must be a number of at least 0")
    if not lr.get("warmup_iters", 0):  # mmcv wants at least one step of a warmup
        lr.pop("warmup", None)
    schedule = LrSchedule(steps, policy, lr)
    try:
        schedule.check()
    except Exception as error:  # whatever mmcv's hook refuses with
        raise ConfigError(
            f"lr_config = {dict(cfg.lr_config)} of {path} cannot work: {reason_of(error)}"
        ) from error
    return schedule


def _schedule_warnings(lr_config: Mapping[str, Any], lr: Any, steps: int, path: str) -> Iterator[str]:
    """What is odd about a schedule. lr: the optimizer's."""
    warmup = lr_config.get("warmup_iters") or 0
    if warmup and lr_config.get("warmup") is None:
        yield f"lr_config.warmup_iters={warmup} of {path} warms nothing up without warmup='linear' (or 'constant', 'exp')"
    elif warmup >= steps:
        yield f"lr_config.warmup_iters={warmup} of {path} is as long as all of the training ({steps} steps), which never gets to its learning rate"
    least = lr_config.get("min_lr")
    if lr == 0 and not least:
        yield f"optimizer.lr={lr!r} of {path}, so no weight changes"
    if isinstance(least, (int, float)) and isinstance(lr, (int, float)) and least > lr:
        yield f"lr_config.min_lr={least:g} of {path} is above optimizer.lr={lr:g}, so the learning rate grows"


def leaf_datasets(entry: Any) -> Iterator[ConfigDict]:
    """The plain data sets inside wrappers (RepeatDataset, ConcatDataset, MultiImageMixDataset, lists, ...) of a `data.train` or `data.val` entry.

    Raises ConfigError for a ConcatDataset of nothing.
    """
    if isinstance(entry, (list, tuple)):
        for item in entry:
            yield from leaf_datasets(item)
    elif isinstance(entry, Mapping) and entry.get("type") == "ConcatDataset":
        if not isinstance(entry.get("datasets"), (list, tuple)) or not entry["datasets"]:
            raise ConfigError("a ConcatDataset of the config needs datasets=[dict(...), dict(...)]")
        yield from leaf_datasets(entry["datasets"])
    elif isinstance(entry, Mapping) and "dataset" in entry:
        yield from leaf_datasets(entry["dataset"])
    else:
        yield entry
