"""A config file loaded: found, executed by mmcv, and the modules imported that it asks for."""

import difflib
import os
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mmcv import Config
from mmcv.utils import import_modules_from_strings

from internseg_ds.config import packaged
from internseg_ds.config.config_text import config_dict
from internseg_ds.config.packaged import PACKAGE
from internseg_ds.errors import ConfigError, reason_of


def load_config(config: str | os.PathLike | Config) -> tuple[str, Config]:
    """(path for messages, config) of a file, or of a copy of a Config. config: a path, or the name of one of ours
    (`packaged.find`). Raises ConfigError for a missing or broken file, and for a module that cannot be imported."""
    if isinstance(config, Config):
        return config.filename or "config", Config(config_dict(config), filename=config.filename)
    given, config = config, packaged.find(config, packaged.CONFIGS)
    if not config.is_file():
        near = packaged.near_miss(given, packaged.CONFIGS)
        raise ConfigError(f"there is no config file {given}{near}")
    import internseg_ds.data.datasets

    # before the config's imports register theirs: a module that registers a name of ours gets an error
    import internseg_ds.models  # noqa: F401 - registers ours

    cfg = executed(config)
    _import_modules(cfg.get("custom_imports") or {}, str(config))
    return str(config), Config(config_dict(cfg), filename=str(config))


def executed(config: str | os.PathLike) -> Config:
    """The config of a file as mmcv reads it, without the modules that it asks for. Raises ConfigError for
    whatever it raises."""
    try:
        return Config.fromfile(str(config), import_custom_modules=False)
    except Exception as error:  # a config is a program: whatever it raises, the user wrote it
        _close_copies(error)
        raise ConfigError(f"config {config} cannot be read: {reason_of(error)}") from error


def _close_copies(error: Exception) -> None:
    """Closes the copies of a config that mmcv 1.7 (utils/config.py, `_file2dict`) executes, and leaves open
    where one raises: when Python deletes it, its folder is gone, and that would be printed."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        copy = frame.f_locals.get("temp_config_file")
        if copy is not None:
            with suppress(FileNotFoundError):
                copy.close()


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
            fix = _moved(name) or "its folder must be on PYTHONPATH, or its package installed"
            if "already registered" in str(error):
                fix = (
                    "mmcv, mmseg or internseg_ds have a class of that name; leave the import "
                    "out, rename yours, or register it with force=True"
                )
            raise ConfigError(
                f"custom_imports of {path}: {name!r} cannot be imported: {reason_of(error)}; {fix}"
            ) from error


def _moved(name: object) -> str:
    """What to do about a module of this package that does not exist, or not any more; "" for any other."""
    if not isinstance(name, str) or name.partition(".")[0] != PACKAGE.name:
        return ""
    modules = sorted(
        ".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts))
        for file in PACKAGE.rglob("*.py")
        if not file.name.startswith("_")
    )
    if name in modules:
        return ""
    same_file = [module for module in modules if module.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_file or difflib.get_close_matches(name, modules, n=1)
    hint = f"; the nearest module that there is: {near[0]}" if near else ""
    return f"leave it out, for {PACKAGE.name} registers all of its own by itself{hint}"
