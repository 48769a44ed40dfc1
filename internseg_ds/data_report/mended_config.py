"""`--fix`: a config that inherits from the given one and sets what mends it.

In: the given config and `Setting`s. Out: a file with the sections that differ, and no other.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcv import Config

from internseg_ds.config.config_text import config_dict, config_text
from internseg_ds.config.experiment import Experiment
from internseg_ds.data.checks.findings import Setting
from internseg_ds.data.entries import leaf_datasets, with_inner_steps
from internseg_ds.errors import ConfigError, OutputError


def write_mended(experiment: Experiment, settings: Sequence[Setting], out: Path) -> Path:
    """Writes `out`, which inherits from the config of `experiment`, with its --cfg-options.

    Raises ConfigError where there is nothing to set, OutputError where `out` is there already or cannot be written."""
    settings = [setting for place, setting in enumerate(settings) if setting not in settings[:place]]
    config = experiment.path
    before = config_dict(Config.fromfile(config, import_custom_modules=False))
    after = config_dict(experiment.cfg)
    for setting in settings:
        _apply(after, setting)
    changed = _difference(before, after)
    if not settings or not changed:
        raise ConfigError("--fix: no setting of the config mends what was found")
    base = os.path.relpath(Path(config).resolve(), out.resolve().parent)
    lines = [f"# {setting}" for setting in settings]
    text = "\n".join(
        ["# What launch/check_data.py found, mended:", *lines, f"_base_ = [{base!r}]", config_text(changed)]
    )
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(
            f"--fix: there is a file {out} already, which is not overwritten; name another"
        ) from None
    except OSError as error:
        raise OutputError(f"--fix: {out} cannot be written: {error}") from None
    return out


def _apply(cfg: dict[str, Any], setting: Setting) -> None:
    first, _, split = setting.where.partition(".")
    if first != "data":
        section: Any = cfg
        for key in setting.where.split("."):
            section = section[int(key) if isinstance(section, (list, tuple)) else key]
        section[setting.key] = setting.value
        return
    # data.test is scored like data.val
    for name in (split, "test") if split == "val" else (split,):
        for leaf in leaf_datasets(cfg["data"].get(name) or []):
            if setting.img_dir is not None and setting.img_dir not in _folders(leaf):
                continue
            steps = (step for step in with_inner_steps(leaf["pipeline"]) if step.get("type") == setting.step)
            for place in steps if setting.step else [leaf]:
                place[setting.key] = setting.value


def _folders(leaf: Mapping[str, Any]) -> list[str]:
    folders = leaf.get("img_dir") or []
    folders = folders if isinstance(folders, (list, tuple)) else [folders]
    return [os.path.join(leaf.get("data_root") or "", folder) for folder in folders]


def _difference(before: Any, after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `after` that `before` has otherwise; of sections that both have, theirs."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key) if isinstance(before, Mapping) else None
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if inner := _difference(old, value):
                found[key] = inner
        elif value != old:
            found[key] = value
    return found
