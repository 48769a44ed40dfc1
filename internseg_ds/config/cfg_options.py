"""The paths of `--cfg-options`: one that names nothing is an error which names the nearest one that does."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmcv import Config

from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.config.known_keys import KNOWN, OPTIONAL, READ, RUN
from internseg_ds.errors import ConfigError

ENGINE = [setting.name for setting in fields(EngineOptions)]


def check_option(cfg: Config, option: str, path: str) -> None:
    """A path must lead to a key of the config, or to one that can be added to it: a setting of the run or of
    `engine`, a section that the file leaves out, or an argument of a section that has a `type`.

    path: the config's, for messages. Raises ConfigError when it names nothing.
    """
    parts = option.split(".")
    node: Any = cfg
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        is_last = depth == len(parts) - 1
        if part in _keys_of(node):
            _check_can_be_set(node, parent, part, option, path, is_last=is_last)
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
        elif _can_be_added(node, parent, part, is_last=is_last):
            return
        elif parent == "" and part == "engine":
            node = dict.fromkeys(ENGINE)
        elif not is_last and _is_optional_section(parent, part):
            node = {}
        else:
            raise _no_such_key(node, parent, part, option, path)


def _keys_of(node: Any) -> list[str]:
    if isinstance(node, (list, tuple)):
        return [str(index) for index in range(len(node))]
    return list(node.keys()) if isinstance(node, (Config, Mapping)) else []


def _check_can_be_set(node: Any, parent: str, part: str, option: str, path: str, *, is_last: bool) -> None:
    """Raises ConfigError for a key that exists, and which mmcv cannot set or nobody would read."""
    if isinstance(node, tuple) or (isinstance(node, list) and is_last):
        raise ConfigError(
            f"--cfg-options {option}: one element of a list cannot be set; write all of them, "
            f"{parent}=[..., ...]"
        )
    if parent == "" and part not in READ:
        raise ConfigError(
            f"--cfg-options {option}: {part} is a variable of {path}, which its sections have taken already; "
            "set what they made of it"
        )


def _can_be_added(node: Any, parent: str, part: str, *, is_last: bool) -> bool:
    """Whether a key that the file does not have is a setting."""
    if parent == "":
        return is_last and part in RUN
    if parent == "engine" and part in ENGINE:
        return True
    if not is_last or not isinstance(node, Mapping):
        return False
    return part in KNOWN[parent] if parent in KNOWN else "type" in node


def _is_optional_section(parent: str, part: str) -> bool:
    """Whether a section may be left out of a file."""
    if parent == "":
        return part in KNOWN and part in OPTIONAL
    return f"{parent}.{part}" in KNOWN and (part in OPTIONAL or part in KNOWN.get(parent, ()))


def _no_such_key(node: Any, parent: str, part: str, option: str, path: str) -> ConfigError:
    known = ENGINE if parent == "engine" else _keys_of(node)
    known = [*known, *(KNOWN.get(parent, ()) if parent else READ)]
    near = difflib.get_close_matches(part, known, n=1)
    if near:
        guess = f"did you mean {parent}.{near[0]}?" if parent else f"did you mean {near[0]}?"
    else:
        guess = f"there are {', '.join(known) or 'no keys'}"
    return ConfigError(f"--cfg-options {option}: {part!r} exists nowhere in {parent or path}; {guess}")
