"""`engine.tune` of a config: which parameters of the backbone train, read into what `models/tuning.py` takes."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from internseg_ds.errors import ConfigError, unknown_key
from internseg_ds.models.lora import Lora
from internseg_ds.models.tuning import LastBlocks, TuningMode

ALPHA_PER_RANK = 2.0
"""alpha / rank where a config does not set alpha."""


def read_tuning(value: Any) -> TuningMode:
    """The mode that a config means by `engine.tune`: "all", "head", dict(last_blocks=N) or
    dict(lora=dict(rank=R, ...)). Raises ConfigError for any other."""
    if isinstance(value, (LastBlocks, Lora)) or value in ("all", "head"):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(
            f'engine.tune={value!r} must be one of "all", "head", dict(last_blocks=N) and '
            "dict(lora=dict(rank=16))"
        )
    key, setting = next(iter(value.items()))
    if key == "last_blocks":
        return LastBlocks(_at_least_one(setting, "engine.tune.last_blocks"))
    if key == "lora":
        return _read_lora(setting)
    raise unknown_key(key, ("last_blocks", "lora"), "engine.tune")


def described(mode: TuningMode) -> str | dict[str, Any]:
    """A mode as a config writes it, all settings of it; JSON can hold it."""
    if isinstance(mode, LastBlocks):
        return {"last_blocks": mode.count}
    if isinstance(mode, Lora):
        settings = {setting.name: getattr(mode, setting.name) for setting in fields(Lora)}
        targets = settings["targets"]
        return {"lora": {**settings, "targets": None if targets is None else list(targets)}}
    return mode


def _read_lora(settings: Any) -> Lora:
    if not isinstance(settings, Mapping) or "rank" not in settings:
        raise ConfigError(
            f"engine.tune.lora={settings!r} must be a dict with a rank, as in dict(rank=16, targets=['qkv'])"
        )
    known = [setting.name for setting in fields(Lora)]
    for key in settings:
        if key not in known:
            raise unknown_key(key, known, "engine.tune.lora")
    rank = _at_least_one(settings["rank"], "engine.tune.lora.rank")
    alpha = settings.get("alpha")
    if alpha is None:
        alpha = ALPHA_PER_RANK * rank
    elif not _is_number(alpha) or not 0 < alpha < float("inf"):
        raise ConfigError(f"engine.tune.lora.alpha={alpha!r} must be a number above 0, or None for 2 * rank")
    dropout = settings.get("dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ConfigError(f"engine.tune.lora.dropout={dropout!r} must be a number from 0 to below 1")
    targets = settings.get("targets")
    if targets is not None:
        targets = _names(targets)
    return Lora(rank, float(alpha), float(dropout), targets)


def _names(targets: Any) -> tuple[str, ...]:
    is_list = isinstance(targets, (list, tuple)) and len(targets) > 0
    if not is_list or not all(isinstance(name, str) and name for name in targets):
        raise ConfigError(
            f"engine.tune.lora.targets={targets!r} must be a list of the ends of layers' names, such as "
            "['qkv', 'proj'], or None for all linear layers of the blocks"
        )
    return tuple(targets)


def _at_least_one(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{what}={value!r} must be a whole number, at least 1")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
