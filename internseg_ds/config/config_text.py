"""A config as the text of one config file, which mmcv reads back as an equal config. Not mmcv's
`pretty_text`: its layout takes a minute for a palette of 200 colours, and refuses values that Python does not
print as code."""

import os
import re
import sys
from collections.abc import Mapping
from keyword import iskeyword
from types import ModuleType
from typing import Any

import numpy as np
from mmcv import Config

WIDTH = 140
SHORT = 40
"""Items of a list up to this length share lines, as colours and class names do."""


def config_dict(cfg: Config) -> dict[str, Any]:
    """All keys of a config as plain dicts, lists, tuples and numbers (not NumPy's): a copy."""
    copied: dict[str, Any] = _python_numbers(cfg.to_dict())  # of the ConfigDict inside: Config passes it on
    return copied


def _python_numbers(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _python_numbers(item) for key, item in value.items()}
    return type(value)(map(_python_numbers, value)) if type(value) in (list, tuple) else value


def config_text(cfg: Mapping[str, Any]) -> str:
    """One assignment for each key. What has no text (a lambda, an object) becomes a string that tells what it
    was, with a comment at the top."""
    writer = _Writer()
    lines = [
        f"{key} = {writer.value(value, len(f'{key} = '))}"
        for key, value in cfg.items()
        if not isinstance(value, ModuleType)
    ]
    if writer.lost:
        lines.insert(0, f"# has no text, and is a string below: {', '.join(writer.lost)}")
    return "\n".join([*(f"import {name}" for name in sorted(writer.imports)), *lines]) + "\n"


BRACKETS: dict[type, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}")}


class _Writer:
    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.lost: list[str] = []

    def value(self, value: Any, used: int, indent: int = 0) -> str:
        """used: characters of its line that stand before it. indent: of that line."""
        inner = indent + 4
        if isinstance(value, Mapping):
            named = all(isinstance(key, str) and key.isidentifier() and not iskeyword(key) for key in value)
            items = [f"{key}=" if named else f"{key!r}: " for key in value]
            items = [
                head + self.value(item, inner + len(head), inner)
                for head, item in zip(items, value.values(), strict=True)
            ]
            opening, closing = ("dict(", ")") if named else ("{", "}")
        elif type(value) in (list, tuple, set) and value:
            items = [self.value(item, inner, inner) for item in value]
            opening, closing = BRACKETS[type(value)]
            if isinstance(value, tuple) and len(items) == 1:
                closing = ",)"
        else:
            return self._atom(value)
        flat = opening + ", ".join(items) + closing
        if "\n" not in flat and used + len(flat) < WIDTH:
            return flat
        return f"{opening}\n{_laid_out(items, inner)}\n{' ' * indent}{closing}"

    def _atom(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, str, bytes, list, tuple, set):
            return repr(value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
            self.imports.add("numpy")
            return f"numpy.array({value.tolist()!r}, dtype={value.dtype.str!r})"
        if isinstance(value, os.PathLike):
            return repr(os.fspath(value))
        if isinstance(value, np.generic):
            return self._atom(value.item())
        if type(value) is float:
            return repr(value) if value - value == 0 else f"float('{value}')"
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(module, str) and isinstance(name, str) and _found(module, name) is value:
            if module == "builtins":
                return name
            self.imports.add(module)
            return f"{module}.{name}"
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        self.lost.append(text)
        return repr(text)


def _found(module: str, name: str) -> Any:
    node = sys.modules.get(module)
    for part in name.split("."):
        node = getattr(node, part, None)
    return node


def _laid_out(items: list[str], indent: int) -> str:
    """The items on lines of their own, or filling lines where all are short."""
    if not all(len(item) <= SHORT and "\n" not in item and "=" not in item for item in items):
        return ",\n".join(" " * indent + item for item in items)
    lines = [" " * indent]
    for number, item in enumerate(items):
        item += "," if number < len(items) - 1 else ""
        if len(lines[-1]) + len(item) + 1 > WIDTH and lines[-1].strip():
            lines.append(" " * indent)
        lines[-1] += (" " if lines[-1].strip() else "") + item
    return "\n".join(lines)
