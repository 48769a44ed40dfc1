"""How a run that goes on from a checkpoint differs from the run that saved it: settings, which are listed in the
log, and the meaning of the classes, which must not change.

In: the config's text and the classes of the manifest, and those of now. The manifest is somebody's file: its text is
parsed, and never run.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internseg_ds.errors import CheckpointError, counted, short_repr

SECTIONS = ("model", "data", "optimizer", "optimizer_config", "lr_config", "runner", "engine")
"""Of a config, which have a part in what is trained, and on what. `data.test` has none, nor have workers."""
PASSED_OVER = ("data.test", "data.workers_per_gpu")
LONGEST_TEXT = 2**20
"""Characters of a config that are read; those of 1,000 classes with colours have some 40,000."""
LINES = 40
"""Changed settings that are listed one by one."""
SHORT = 80
NOT_SET = "not set"


def changed_settings(before: Any, now: str) -> list[str]:
    """One line for each setting that differs between two texts of `config_text`; none where there was no
    config (plain DeepSpeed's saves)."""
    if not before:
        return []
    try:
        settings = [dict(_settings(text)) for text in (before, now)]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return [
            "the config in the checkpoint's note cannot be read, so nothing tells what this run's says "
            "otherwise"
        ]
    then, here = settings
    changed = [
        key for key in {**then, **here} if _plain(then.get(key, NOT_SET)) != _plain(here.get(key, NOT_SET))
    ]
    lines = [
        f"the checkpoint's run had another setting: {key} {_short(then.get(key, NOT_SET))} -> "
        f"{_short(here.get(key, NOT_SET))}"
        for key in changed[:LINES]
    ]
    return lines + ([f"and {len(changed) - LINES} more settings differ"] if len(changed) > LINES else [])


def _rates(groups: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def changed_groups(before: Any, now: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each change of learning rate and weight decay that parameters have, with how many of them;
    none where the note has no groups.

    before: the note's groups, and now: this run's, as `named_groups` gives them. A parameter that gets its
    rate from another part of the config than before is found here alone: the settings that moved it may stand
    outside of `optimizer` (another backbone's depth, code of a group's own).
    """
    if not before:
        return []
    here = _rates(now)
    try:
        then = _rates(before)
    except (TypeError, KeyError):
        return [
            "the parameter groups in the checkpoint's note cannot be read, so nothing tells whose learning "
            "rate or weight decay is another one"
        ]
    changes: dict[tuple[Any, Any], list[str]] = {}
    for name in here:
        if name in then and then[name] != here[name]:
            changes.setdefault((then[name], here[name]), []).append(name)
    unknown = sum(name not in then for name in here)
    lines = (
        [f"{counted(unknown, 'parameter stands', 'parameters stand')} in no group of the checkpoint's note"]
        if unknown
        else []
    )
    lines += [
        "the checkpoint's run had another learning rate or weight decay for "
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: "
        f"lr {old[0]:g} -> {new[0]:g}, weight_decay {old[1]:g} -> {new[1]:g}"
        for (old, new), names in list(changes.items())[:LINES]
    ]
    return lines + (
        [f"and {len(changes) - LINES} more changes of learning rates"] if len(changes) > LINES else []
    )


def changed_classes(path: Path, before: Any, now: Sequence[str]) -> list[str]:
    """A line for each class that has another name. Raises CheckpointError where the weights would mean other
    classes: another number, or another order."""
    if not isinstance(before, (list, tuple)) or list(before) == list(now):
        return []
    fix = (
        "resume with the classes that it was saved with, in their order, or start anew from its "
        "weights with --load-from"
    )
    if len(before) != len(now):
        raise CheckpointError(
            f"{path} was trained on {counted(len(before), 'class')}, data.train of this run has "
            f"{len(now)}; {fix}"
        )
    number_of = {name: number for number, name in enumerate(now)}
    if moved := [
        (number, name)
        for number, name in enumerate(before)
        if isinstance(name, str) and number_of.get(name, number) != number
    ]:
        number, name = moved[0]
        raise CheckpointError(
            f"{path} was trained on the same classes in another order: class {number} was {name!r} and is "
            f"{now[number]!r} in data.train of "
            f"this run ({counted(len(moved), 'class')} moved); its weights would mean other classes; {fix}"
        )
    return [
        f"the checkpoint's run had another name for class {number}: {then!r} -> {here!r}"
        for number, (then, here) in enumerate(zip(before, now, strict=True))
        if then != here
    ][:LINES]


def _settings(text: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting of the SECTIONS."""
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        raise ValueError("no text of a config")
    for line in ast.parse(text).body:
        if (
            isinstance(line, ast.Assign)
            and isinstance(line.targets[0], ast.Name)
            and line.targets[0].id in SECTIONS
        ):
            yield from _flat(line.targets[0].id, _value(line.value))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name in PASSED_OVER:
        return
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list) and any(isinstance(x, dict) for x in value)
        else None
    )
    if items is None:
        yield name, value
    for key, item in items or ():
        yield from _flat(f"{name}.{key}", item)


def _value(node: ast.expr) -> Any:
    """What an expression of `config_text` says; of an expression that would have to be run, its text."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "dict"
        and not node.args
        and all(kw.arg for kw in node.keywords)
    ):
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {
            key.value: _value(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        }
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _plain(value: Any) -> Any:
    """Lists and tuples say the same."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    return value if value == NOT_SET else short_repr(value, SHORT)
