"""Variables of a config file that its sections do not follow: mmcv reads each file by itself, so that a
variable set over a `_base_` leaves all that the base made of its own as it was.

In: a config. Out: warnings.
"""

import ast
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmcv import Config

from internseg_ds.config.config_file import executed
from internseg_ds.config.config_text import config_dict
from internseg_ds.config.known_keys import ELSEWHERE, READ, SECTIONS
from internseg_ds.data.entries import steps_of
from internseg_ds.errors import short_repr


def unused_crop_size(cfg: Mapping[str, Any], path: str) -> list[str]:
    """A warning where the config has a `crop_size` at its top that no step of the training pipeline has: set
    over a `_base_`, it changes nothing else."""
    crop = cfg.get("crop_size")
    steps = steps_of(cfg["data"]["train"])
    sizes = [
        tuple(step[key])
        for step in steps
        for key in ("crop_size", "size")
        if isinstance(step.get(key), (list, tuple))
    ]
    if not isinstance(crop, (list, tuple)) or not sizes or tuple(crop) in sizes:
        return []
    there = ", ".join(map(str, dict.fromkeys(sizes)))
    return [
        f"crop_size = {crop} of {path} is a variable that no step of data.train.pipeline has (there are "
        f"{there}); set over a _base_, it does not change "
        "the pipelines of that file: write them again, too"
    ]


def unused_variables(cfg: Config, path: str) -> list[str]:
    """A warning for each variable that the file sets over one of its `_base_`, where no section has the new
    value."""
    sections = {key: cfg[key] for key in SECTIONS if key in cfg}
    unused = [
        key
        for key, value in cfg.items()
        if key not in READ and key not in ELSEWHERE and key != "crop_size" and not _stands_in(value, sections)
    ]
    if not unused or not cfg.filename:
        return []
    before: dict[str, Any] = {}
    for base in _bases(Path(cfg.filename)):
        before |= config_dict(executed(base))
    return [
        f"{key} = {short_repr(cfg[key])} of {path} is a variable set over a _base_ (there "
        f"{short_repr(before[key])}), and no section has it: it does not "
        "change what that file made of its own; set it in the sections themselves"
        for key in unused
        if key in before and not _same(before[key], cfg[key])
    ]


def _bases(file: Path) -> list[Path]:
    """The files that a config names as its `_base_`, where it names them as literals."""
    for statement in ast.parse(file.read_text(encoding="utf-8")).body if file.suffix == ".py" else ():
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "_base_" for target in statement.targets
        ):
            with suppress(ValueError):  # of what is no literal
                named = ast.literal_eval(statement.value)
                return [file.parent / name for name in ([named] if isinstance(named, str) else named)]
    return []


def _stands_in(value: Any, node: Any) -> bool:
    """Whether a section, or a part of one, is `value`, or holds it: a dict with more keys, a longer list or
    text."""
    if isinstance(value, Mapping) and isinstance(node, Mapping):
        found = all(key in node and _same(item, node[key]) for key, item in value.items())
    elif isinstance(value, (list, tuple)) and isinstance(node, (list, tuple)):
        found = any(
            _same(value, node[start : start + len(value)]) for start in range(len(node) - len(value) + 1)
        )
    elif isinstance(value, str) and isinstance(node, str):
        found = value in node
    else:
        found = _same(value, node)
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ()
    return found or any(_stands_in(value, part) for part in inner)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of configs are equal; mmcv makes lists of tuples and the reverse."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)  # arrays have no single answer to ==
