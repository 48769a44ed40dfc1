"""The settings of runs, side by side: read from the config and the ds_config that lie in a work directory.

Nothing of a config is executed: these are files of whoever trained.
"""

import ast
import json
from collections.abc import Sequence
from typing import Any

LONGEST = 200
"""Characters of a value that are shown."""


def settings_of(config: str, ds_config: str) -> dict[str, str]:
    """All settings by their dotted names, as text; those of the ds_config behind "ds_config."."""
    found: dict[str, str] = {}
    try:
        for node in ast.parse(config).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                _flatten(node.targets[0].id, _value(node.value), found)
    except (SyntaxError, ValueError):
        found["config.py"] = "cannot be read"
    try:
        _flatten("ds_config", json.loads(ds_config or "{}"), found)
    except json.JSONDecodeError:
        found["ds_config.json"] = "cannot be read"
    return found


def _value(node: ast.expr) -> Any:
    """dict(...), {...} and lists of them as such; all else as its text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value) for word in node.keywords if word.arg}
    if isinstance(node, ast.Dict):
        return {
            ast.unparse(key).strip("'\"") if key else "**": _value(value)
            for key, value in zip(node.keys, node.values, strict=True)
        }
    if isinstance(node, (ast.List, ast.Tuple)) and any(
        isinstance(item, (ast.Call, ast.Dict)) for item in node.elts
    ):
        return [_value(item) for item in node.elts]
    return ast.unparse(node)


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        items = ()
    for key, item in items:
        _flatten(f"{name}.{key}", item, found)
    if not items:
        text = value if isinstance(value, str) else json.dumps(value)
        found[name] = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def differing(of_runs: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, with the value in each ("" where it has none)."""
    names = dict.fromkeys(name for settings in of_runs for name in settings)
    rows = [(name, [settings.get(name, "") for settings in of_runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
