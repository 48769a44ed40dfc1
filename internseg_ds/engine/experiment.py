"""The experiment config, read once at the border: an mmcv Config in, a frozen `Experiment` out. Below this nobody calls `cfg.get`.

Published configs of MMSegmentation 0.x, InternVL and InternImage are read as they stand. What mmcv's runner did and the engine does itself is
interpreted; a key that has no effect here becomes one line in `Experiment.notes`, which the run logs. Loads no DeepSpeed and no model.
"""

import difflib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmcv import Config, ConfigDict

from internseg_ds.distributed.lr_schedule import PolySchedule
from internseg_ds.errors import ConfigError, unknown_key


@dataclass(frozen=True)
class EngineOptions:
    """The config's own section for this engine, `engine = dict(...)`; a published file without it gets these defaults."""

    global_batch: int | None = None
    """Images per optimizer step, whatever the number of processes; the gradient accumulation is derived from it. None: no accumulation."""
    backbone_dtype: str = "auto"
    """dtype in which the backbone computes: "bfloat16", "float32", or "auto": bfloat16 where the hardware multiplies it natively, else float32."""
    heads_dtype: str = "float32"
    """dtype in which the heads compute: "float32" (TF32 in a GPU's convolutions), or "bfloat16", with norms, class scores and losses in float32."""
    recomputation: str | int = "config"
    """Activation checkpointing of the backbone: "config" (as its with_cp says: every block or none), "none", "blocks" (every block), k (every k-th block),
    "all_but_matmuls" (each block keeps the results of matrix products and attention, and computes the rest again), or "auto" (by the plan of the run's memory,
    the one that recomputes least and fits)."""
    evaluate_before: bool = False
    """Evaluate once before the first step, to see what training starts from."""
    evaluation_weights: str = "auto"
    """How a model that ZeRO-3 has partitioned is evaluated: "whole" from a copy of the weights on each rank, "partitioned" layer by layer with the ranks in
    step, "auto" from a copy where there is room for it."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, 0.999 say; it is evaluated in their place, and saved beside them. None: no average."""
    background_save: bool = False
    """Write checkpoints while the training goes on, from a copy in host memory."""
    max_data_faults: int = 0
    """Training images that may be damaged: each is named, and another takes its place. One more ends the run; by default, the first."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a loss or a gradient that is not finite; that many end the run."""
    weights_may_differ: tuple[str, ...] = ()
    """Prefixes of names that the weights a run starts from may have too many, too few, or of another shape (other classes);
    any other difference is an error."""
    peak_tflops: float | None = None
    """Peak of matrix products in the backbone's compute dtype, in TFLOP/s per device, which mfu and hfu are relative to. None: measured at the start."""

    def __post_init__(self) -> None:
        if not isinstance(self.weights_may_differ, (list, tuple)) or not all(isinstance(prefix, str) for prefix in self.weights_may_differ):
            raise ConfigError(f"engine.weights_may_differ={self.weights_may_differ!r} must be a list of prefixes of names")
        object.__setattr__(self, "weights_may_differ", tuple(self.weights_may_differ))
        if self.ema is not None and not (isinstance(self.ema, float) and 0 < self.ema < 1):
            raise ConfigError(f"engine.ema={self.ema!r} must be a number between 0 and 1, such as 0.999, or None")
        if self.backbone_dtype not in ("auto", "bfloat16", "float32"):
            raise ConfigError(f"engine.backbone_dtype={self.backbone_dtype!r} is none of 'auto', 'bfloat16', 'float32'")
        if self.heads_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"engine.heads_dtype={self.heads_dtype!r} is none of 'float32', 'bfloat16'")
        if self.evaluation_weights not in ("auto", "whole", "partitioned"):
            raise ConfigError(f"engine.evaluation_weights={self.evaluation_weights!r} is none of 'auto', 'whole', 'partitioned'")
        if self.global_batch is not None:
            _whole(self.global_batch, "engine.global_batch", least=1)
        for name in ("evaluate_before", "background_save"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"engine.{name}={getattr(self, name)!r} must be True or False")
        _whole(self.max_data_faults, "engine.max_data_faults", least=0)
        _whole(self.max_skipped_steps, "engine.max_skipped_steps", least=1)
        peak = self.peak_tflops
        if peak is not None and (isinstance(peak, bool) or not isinstance(peak, (int, float)) or not 0 < peak < math.inf):
            raise ConfigError(f"engine.peak_tflops={peak!r} must be a number of TFLOP/s per device above 0, "
                              "such as 989 for an H100 in bf16, or None to measure it")


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
    schedule: PolySchedule
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
    engine: EngineOptions
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def work_dir(self) -> Path:
        """Where its results go when nobody says otherwise."""
        return Path("work_dirs") / self.name

    @property
    def max_steps(self) -> int:
        return self.schedule.max_steps


# keys of mmcv's runner that have no effect here, each with the line that says so
REPLACED = {
    "deepspeed": "every run here is a DeepSpeed run",
    "deepspeed_config": "the ds_config is given on the command line",
    "custom_hooks": "there are no hooks; precision is the engine's",
    "dist_params": "nccl on GPUs, gloo on CPUs",
    "workflow": "training and evaluation alternate as `evaluation.interval` says",
    "opencv_num_threads": "data workers use one OpenCV thread each",
    "mp_start_method": "data workers are forked",
    "find_unused_parameters": "ZeRO needs no such setting",
    "device": "the device is the accelerator, where there is one",
    "gpu_ids": "processes are the launcher's",
}
SCORES = {"mIoU": ("mIoU", "mAcc", "aAcc"), "mDice": ("mDice", "mAcc", "aAcc"), "mFscore": ("mFscore", "mPrecision", "mRecall", "aAcc")}
"""mmseg's metrics, and the scores over all classes that each comes with."""
SECTIONS = ("model", "data", "optimizer", "lr_config", "runner", "evaluation", "checkpoint_config", "log_config", "optimizer_config", "engine")
OPTIONAL = SECTIONS[5:]
LOG_HOOKS = ("TextLoggerHook", "TensorboardLoggerHook", "WandbLoggerHook", "MMSegWandbHook")


def read_experiment(config: str | os.PathLike | Config, cfg_options: Mapping[str, Any] | None = None) -> Experiment:
    """Reads a config file (or an mmcv Config) and applies `--cfg-options`.

    Raises ConfigError for a missing or broken file, an option path that exists nowhere, an unknown key of `engine`, and whatever the engine
    cannot run (an epoch-based runner, a schedule that is not poly).
    """
    path, cfg = _load(config)
    for option, value in (cfg_options or {}).items():
        _option_exists(cfg, option, path)
        cfg.merge_from_dict({option: value})
    for key in ("model", "data", "optimizer", "lr_config", "runner"):
        if key not in cfg:
            raise ConfigError(f"{path} has no {key!r} section; take one of configs/ as an example")
    for key in SECTIONS:
        if not isinstance(cfg.get(key, {}), Mapping) and (key not in OPTIONAL or cfg[key] is not None):
            raise ConfigError(f"{key}={cfg[key]!r} of {path} must be a section dict(...)")
    _check_data(cfg.data, path)
    notes = [f"{key} = {_short(cfg[key])} has no effect: {why}" for key, why in REPLACED.items() if cfg.get(key) is not None]
    loader = {**{k: v for k, v in cfg.data.items() if k in ("samples_per_gpu", "workers_per_gpu")}, **cfg.data.get("train_dataloader", {})}
    val = cfg.data.get("val") or cfg.data.get("test")
    for section in ("evaluation", "checkpoint_config", "log_config", "optimizer_config", "lr_config", "runner"):
        notes += [f"{section}.{key} has no effect here" for key in cfg.get(section) or {} if key not in KNOWN[section]]
    evaluation, saving, logging_ = (cfg.get(key) or {} for key in ("evaluation", "checkpoint_config", "log_config"))
    schedule = _schedule(cfg, path)
    if saving.get("by_epoch", False) or evaluation.get("by_epoch", False):
        notes.append("by_epoch is taken as False: intervals are in steps")
    optimizer_config = cfg.get("optimizer_config") or {}
    options = _engine_options(cfg.get("engine") or {}, path)
    cumulative = optimizer_config.get("cumulative_iters")
    if cumulative is not None and options.global_batch is not None:
        raise ConfigError(f"{path} sets engine.global_batch={options.global_batch} and optimizer_config.cumulative_iters={cumulative}; keep one of them")
    hooks = tuple(logging_.get("hooks") or ()) if isinstance(logging_.get("hooks", ()), (list, tuple, type(None))) else (None,)
    if not all(isinstance(hook, Mapping) and "type" in hook for hook in hooks):
        raise ConfigError(f"log_config.hooks={logging_['hooks']!r} of {path} must be a list of dict(type=...)")
    notes += [f"log_config.hooks: {hook['type']} is not known here and is left out" for hook in hooks if hook["type"] not in LOG_HOOKS]
    metric = evaluation.get("metric", "mIoU")
    if not metric or not isinstance(metric, (str, list, tuple)):
        raise ConfigError(f"evaluation.metric={metric!r} of {path} names no metric; the metrics are {', '.join(SCORES)}")
    metrics = known_metrics((metric,) if isinstance(metric, str) else tuple(metric), f"evaluation.metric of {path}")
    return Experiment(
        path=path,
        cfg=cfg,
        model=cfg.model,
        train=cfg.data.train,
        val=val,
        test=cfg.data.get("test") or val,
        micro_batch=_whole(loader.get("samples_per_gpu", 2), f"data.samples_per_gpu of {path}", least=1),
        workers=_whole(loader.get("workers_per_gpu", 2), f"data.workers_per_gpu of {path}", least=0),
        optimizer=cfg.optimizer,
        schedule=schedule,
        accumulation=cumulative,
        gradient_clipping=_clipping(optimizer_config.get("grad_clip") or {}, path),
        save_every=_whole(saving.get("interval", schedule.max_steps), f"checkpoint_config.interval of {path}", least=-1),
        max_keep_ckpts=_whole(saving.get("max_keep_ckpts", -1), f"checkpoint_config.max_keep_ckpts of {path}", least=-1),
        evaluate_every=_whole(evaluation.get("interval", schedule.max_steps), f"evaluation.interval of {path}", least=-1),
        metrics=metrics,
        best_by=_best_by(evaluation.get("save_best"), metrics, path),
        log_every=_whole(logging_.get("interval", 50), f"log_config.interval of {path}", least=1),
        log_hooks=hooks,
        log_level=_log_level(cfg.get("log_level", "INFO"), path),
        cudnn_benchmark=bool(cfg.get("cudnn_benchmark", False)),
        load_from=_path(cfg.get("load_from"), f"load_from of {path}"),
        resume_from=_path(cfg.get("resume_from"), f"resume_from of {path}"),
        engine=options,
        notes=tuple(notes),
    )


def _path(value: Any, what: str) -> str | None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{what} is {value!r}; it must be a path, or None")
    return value


def _check_data(data: Mapping[str, Any], path: str) -> None:
    """The data sections must be dicts (or lists of them) with a pipeline, each data set inside wrappers too."""
    for split in ("train", "val", "test"):
        if split == "train" and data.get(split) is None:
            raise ConfigError(f"{path}: data has no 'train' entry")
        for entry in leaf_datasets(data[split]) if data.get(split) is not None else ():
            if not isinstance(entry, Mapping):
                raise ConfigError(f"data.{split} of {path} is {entry!r}; it must be a data set dict(type=..., pipeline=[...])")
            if not isinstance(entry.get("pipeline"), (list, tuple)) or not entry["pipeline"]:
                raise ConfigError(f"data.{split}.pipeline={entry.get('pipeline')!r} of {path} must be a list of transforms")
            for key in ("data_root", "img_dir", "ann_dir"):
                folders = entry.get(key) if isinstance(entry.get(key), (list, tuple)) else [entry.get(key)]
                if not all(isinstance(folder, (str, type(None))) for folder in folders):
                    raise ConfigError(f"data.{split}.{key}={entry[key]!r} of {path} must be a path")


def _clipping(grad_clip: Any, path: str) -> float:
    if not isinstance(grad_clip, Mapping):
        raise ConfigError(f"optimizer_config.grad_clip={grad_clip!r} of {path} must be dict(max_norm=...)")
    norm, kind = grad_clip.get("max_norm", 0.0), grad_clip.get("norm_type", 2)
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or norm < 0 or kind != 2:
        raise ConfigError(f"optimizer_config.grad_clip={dict(grad_clip)} of {path}: max_norm must be a number of at least 0, "
                          "and norm_type 2, the only one that DeepSpeed has")
    return float(norm)


def _whole(value: Any, what: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what} is {value!r}; it must be a whole number, at least {least}")
    return value


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
    if save_best not in scores:
        raise ConfigError(f"evaluation.save_best={save_best!r} of {path} is no score of evaluation.metric={'/'.join(metrics)}; "
                          f"there are {', '.join(scores)}, or 'auto'")
    return save_best


def _log_level(level: Any, path: str) -> str:
    if not isinstance(level, str) or level not in logging.getLevelNamesMapping():
        raise ConfigError(f"log_level={level!r} of {path} is no level of logging; 'INFO' is the usual one")
    return level


def _load(config: str | os.PathLike | Config) -> tuple[str, Config]:
    if isinstance(config, Config):
        return config.filename or "config", Config(config._cfg_dict.to_dict(), filename=config.filename)
    if not Path(config).is_file():
        near = difflib.get_close_matches(str(config), map(str, Path("configs").rglob("*.py")), n=1, cutoff=0.3)
        raise ConfigError(f"there is no config file {config}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return str(config), Config.fromfile(str(config))
    except Exception as error:  # a config is a program: whatever it raises, the user wrote it
        raise ConfigError(f"config {config} cannot be read: {type(error).__name__}: {error}") from error


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _option_exists(cfg: Config, option: str, path: str) -> None:
    """A `--cfg-options` path must name something: an existing key, a setting of `engine`, or an argument of a section that has a `type`."""
    *parents, leaf = option.split(".")
    node: Any = cfg
    for depth, part in enumerate([*parents, leaf]):
        known: list[str] = []
        if isinstance(node, (list, tuple)):
            known = [str(index) for index in range(len(node))]
        elif isinstance(node, (Config, Mapping)):
            known = list(node.keys())
        if part in known:
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
            continue
        if depth == 0 and part == "engine":
            known = ["engine"]
            node = {setting.name: None for setting in fields(EngineOptions)}
            continue
        prefix = ".".join(option.split(".")[:depth])
        if prefix == "engine":
            known = [setting.name for setting in fields(EngineOptions)]
            if part in known:
                return
        if prefix in KNOWN and part in KNOWN[prefix] and f"{prefix}.{part}" in KNOWN and depth < len(parents):
            node = {}  # a section that the file leaves out
            continue
        is_argument = part == leaf and depth == len(parents) and isinstance(node, Mapping)
        if is_argument and (part in KNOWN[prefix] if prefix in KNOWN else "type" in node):
            return
        known += KNOWN.get(prefix, ())
        near = difflib.get_close_matches(part, known, n=1)
        guess = f"; did you mean {'.'.join(filter(None, [prefix, near[0]]))}?" if near else f"; there are {', '.join(known) or 'no keys'}"
        raise ConfigError(f"--cfg-options {option}: {part!r} exists nowhere in {prefix or path}{guess}")


# what the engine reads of the sections that configured mmcv's runner, and mmseg of `test_cfg`
KNOWN = {
    "data": ("samples_per_gpu", "workers_per_gpu", "train", "val", "test", "train_dataloader"),
    "evaluation": ("interval", "metric", "save_best", "by_epoch", "pre_eval"),
    "checkpoint_config": ("interval", "max_keep_ckpts", "by_epoch"),
    "optimizer_config": ("grad_clip", "cumulative_iters", "type"),
    "optimizer_config.grad_clip": ("max_norm", "norm_type"),
    "lr_config": ("policy", "warmup", "warmup_iters", "warmup_ratio", "power", "min_lr", "by_epoch"),
    "log_config": ("interval", "hooks"),
    "runner": ("type", "max_iters"),
    "model.test_cfg": ("mode", "crop_size", "stride", "batch_size"),
    "model.train_cfg": (),
}


def _engine_options(section: Mapping[str, Any], path: str) -> EngineOptions:
    known = [setting.name for setting in fields(EngineOptions)]
    for key in section:
        if key not in known:
            raise unknown_key(key, known, f"engine of {path}")
    return EngineOptions(**section)


def _schedule(cfg: Config, path: str) -> PolySchedule:
    if cfg.runner.get("type", "IterBasedRunner") != "IterBasedRunner" or "max_iters" not in cfg.runner:
        raise ConfigError(f"runner = {dict(cfg.runner)} of {path}: steps are counted here, not epochs; "
                          "write runner = dict(type='IterBasedRunner', max_iters=...)")
    steps = cfg.runner.max_iters
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"runner.max_iters={steps!r} of {path} must be a whole number of steps, at least 1")
    lr = cfg.lr_config
    if str(lr.get("policy", "poly")).lower() != "poly" or lr.get("by_epoch", True):
        raise ConfigError(f"lr_config of {path} must be policy='poly' with by_epoch=False, "
                          f"not policy={lr.get('policy')!r}, by_epoch={lr.get('by_epoch', True)}")
    if lr.get("warmup") not in (None, "linear"):
        raise ConfigError(f"lr_config.warmup={lr.warmup!r} of {path}: only 'linear' warmup is known (or none)")
    warmup = _whole(lr.get("warmup_iters", 0), f"lr_config.warmup_iters of {path}", least=0) if lr.get("warmup") else 0
    for key in ("power", "min_lr", "warmup_ratio"):
        if isinstance(lr.get(key, 0), bool) or not isinstance(lr.get(key, 0), (int, float)) or lr.get(key, 0) < 0:
            raise ConfigError(f"lr_config.{key}={lr[key]!r} of {path} must be a number of at least 0")
    return PolySchedule(steps, lr.get("power", 1.0), lr.get("min_lr", 0.0), warmup, lr.get("warmup_ratio", 0.1))


def leaf_datasets(entry: Any) -> Iterator[ConfigDict]:
    """The plain data sets inside wrappers (RepeatDataset, ConcatDataset, lists) of a `data.train` or `data.val` entry."""
    if isinstance(entry, (list, tuple)):
        for item in entry:
            yield from leaf_datasets(item)
    elif isinstance(entry, Mapping) and ("dataset" in entry or "datasets" in entry):
        yield from leaf_datasets(entry.get("dataset", entry.get("datasets")))
    else:
        yield entry
