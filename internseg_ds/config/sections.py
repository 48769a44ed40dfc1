"""The sections of a config that say how a run is evaluated, saved, logged and clipped: each read into a small
frozen dataclass.

In: the config, and its path for messages. Raises ConfigError for a value that cannot be meant. Intervals are
in optimizer steps.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmcv import Config, ConfigDict

from internseg_ds.config.engine_options import whole_number
from internseg_ds.config.known_keys import KNOWN
from internseg_ds.errors import ConfigError, unknown_key

SCORES = {
    "mIoU": ("mIoU", "mAcc", "aAcc"),
    "mDice": ("mDice", "mAcc", "aAcc"),
    "mFscore": ("mFscore", "mPrecision", "mRecall", "aAcc"),
}
"""mmseg's metrics, and the scores over all classes that each comes with."""


@dataclass(frozen=True)
class EvaluationSettings:
    """`evaluation`. interval: 0 or less for never before the end. best_by: the score whose best checkpoint is
    kept (`save_best`; `split_score` takes it apart), or None."""

    interval: int
    metrics: tuple[str, ...]
    best_by: str | None


@dataclass(frozen=True)
class CheckpointSettings:
    """`checkpoint_config`. interval: 0 or less for never before the end. max_keep: how many of the newest
    stay (`max_keep_ckpts`); 0 or less keeps all."""

    interval: int
    max_keep: int


@dataclass(frozen=True)
class LoggingSettings:
    """`log_config` and `log_level`. hooks: mmcv's, for Tensorboard and the like."""

    interval: int
    hooks: tuple[ConfigDict, ...]
    level: str


@dataclass(frozen=True)
class GradientSettings:
    """`optimizer_config`. accumulation: micro-batches per step (`cumulative_iters`), None where it says
    nothing. clipping: largest norm of the whole gradient, 0 for any."""

    accumulation: int | None
    clipping: float


def read_evaluation(cfg: Config, steps: int, path: str) -> EvaluationSettings:
    """steps: of the run, the interval where none is set."""
    section = cfg.get("evaluation") or {}
    metric = section.get("metric", "mIoU")
    if not metric or not isinstance(metric, (str, list, tuple)):
        raise ConfigError(
            f"evaluation.metric={metric!r} of {path} names no metric; the metrics are {', '.join(SCORES)}"
        )
    metrics = known_metrics(
        (metric,) if isinstance(metric, str) else tuple(metric), f"evaluation.metric of {path}"
    )
    return EvaluationSettings(
        interval=whole_number(section.get("interval", steps), f"evaluation.interval of {path}", least=-1),
        metrics=metrics,
        best_by=_best_by(section.get("save_best"), metrics, path),
    )


def read_checkpoints(cfg: Config, steps: int, path: str) -> CheckpointSettings:
    """steps: of the run, the interval where none is set."""
    section = cfg.get("checkpoint_config") or {}
    return CheckpointSettings(
        interval=whole_number(
            section.get("interval", steps), f"checkpoint_config.interval of {path}", least=-1
        ),
        max_keep=whole_number(
            section.get("max_keep_ckpts", -1), f"checkpoint_config.max_keep_ckpts of {path}", least=-1
        ),
    )


def read_logging(cfg: Config, path: str) -> LoggingSettings:
    section = cfg.get("log_config") or {}
    hooks = section.get("hooks")
    hooks = () if hooks is None else hooks
    if not isinstance(hooks, (list, tuple)) or not all(
        isinstance(hook, Mapping) and "type" in hook for hook in hooks
    ):
        raise ConfigError(f"log_config.hooks={hooks!r} of {path} must be a list of dict(type=...)")
    level = cfg.get("log_level", "INFO")
    if not isinstance(level, str) or level not in logging.getLevelNamesMapping():
        raise ConfigError(f"log_level={level!r} of {path} is no level of logging; 'INFO' is the usual one")
    return LoggingSettings(
        interval=whole_number(section.get("interval", 50), f"log_config.interval of {path}", least=1),
        hooks=tuple(hooks),
        level=level,
    )


def read_gradient(cfg: Config, path: str) -> GradientSettings:
    section = cfg.get("optimizer_config") or {}
    accumulation = section.get("cumulative_iters")
    if accumulation is not None:
        whole_number(accumulation, f"optimizer_config.cumulative_iters of {path}", least=1)
    return GradientSettings(accumulation, _clipping(section.get("grad_clip") or {}, path))


def known_metrics(metrics: tuple[str, ...], where: str) -> tuple[str, ...]:
    """`metrics` as they are. Raises ConfigError for one that mmseg does not have; where: what named it, for
    the message."""
    for metric in metrics:
        if metric not in SCORES:
            raise ConfigError(f"{where}: there is no metric {metric!r}; the metrics are {', '.join(SCORES)}")
    return metrics


def split_score(name: str) -> tuple[int | None, str]:
    """Number of the validation set, and score: (1, "mIoU") of "1_mIoU", the score of the second of several
    sets; (None, "mIoU") of "mIoU", the score of all."""
    number, separator, score = name.partition("_")
    return (int(number), score) if separator and number.isdecimal() else (None, name)


def _best_by(save_best: Any, metrics: tuple[str, ...], path: str) -> str | None:
    if not save_best:
        return None
    if save_best in ("auto", True):
        return metrics[0]
    scores = [score for metric in metrics for score in SCORES[metric]]
    if not isinstance(save_best, str) or split_score(save_best)[1] not in scores:
        raise ConfigError(
            f"evaluation.save_best={save_best!r} of {path} is no score of "
            f"evaluation.metric={'/'.join(metrics)}; there are {', '.join(scores)}, or 'auto'"
        )
    return save_best


def _clipping(grad_clip: Any, path: str) -> float:
    if not isinstance(grad_clip, Mapping):
        raise ConfigError(f"optimizer_config.grad_clip={grad_clip!r} of {path} must be dict(max_norm=...)")
    known = KNOWN["optimizer_config.grad_clip"]
    for key in grad_clip:
        if key not in known:
            raise unknown_key(key, known, f"optimizer_config.grad_clip of {path}")
    norm = grad_clip.get("max_norm", 0.0)
    is_number = isinstance(norm, (int, float)) and not isinstance(norm, bool)
    if not (is_number and norm >= 0) or grad_clip.get("norm_type", 2) != 2:
        raise ConfigError(
            f"optimizer_config.grad_clip={dict(grad_clip)} of {path}: max_norm must be a number of at "
            "least 0, and norm_type 2, the only one that DeepSpeed has"
        )
    return float(norm)
