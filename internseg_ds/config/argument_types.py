"""Whether a config's arguments have the types that the constructors of this package's own classes are annotated
with.

Checked before anything is built, so that constructors need not look, and every wrong type has the same sentence.
Numbers are taken as mmcv's configs and NumPy write them: whole numbers for real ones, lists for tuples,
`ConfigDict` for mappings, paths for strings. Classes of mmseg and of users have no annotations to rely on, and
are left to their constructors.
"""

import importlib
import inspect
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmcv.cnn import PLUGIN_LAYERS
from mmseg.models.builder import MODELS

from internseg_ds.errors import short_repr

PACKAGE = __name__.partition(".")[0]
WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "None",
}
MANY = {
    bool: "True and False",
    int: "whole numbers",
    float: "numbers",
    str: "strings",
    Sequence: "lists",
    Mapping: "dicts",
}


def wrong_arguments(settings: Any, path: str) -> Iterator[str]:
    """A sentence for each argument of another type, of all modules in a config section.

    path: the section's name in the config, such as "model".
    """
    if isinstance(settings, Mapping):
        if (kind := _own_class(settings.get("type"))) is not None:
            yield from wrong_types(kind, settings, path)
        for key, value in settings.items():
            yield from wrong_arguments(value, f"{path}.{key}")
    elif isinstance(settings, (list, tuple)):
        for index, value in enumerate(settings):
            yield from wrong_arguments(value, f"{path}[{index}]")


def wrong_types(kind: type, arguments: Mapping[str, Any], path: str) -> Iterator[str]:
    """A sentence for each of `arguments` that has another type than the constructor of `kind`, or of a base of
    it in this package, is annotated with."""
    hints: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == PACKAGE and "__init__" in vars(base):
            named = inspect.signature(vars(base)["__init__"]).parameters
            found = typing.get_type_hints(vars(base)["__init__"])
            for name, parameter in named.items():
                if parameter.kind is not parameter.VAR_KEYWORD:
                    hints.setdefault(name, found.get(name, Any))
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            yield f"{path}.{name}={short_repr(value)} must be {described(hints[name])}"


def _own_class(kind: Any) -> type | None:
    """The class of this package that a config names; None for any other."""
    if isinstance(kind, str):
        kind = MODELS.module_dict.get(kind) or PLUGIN_LAYERS.module_dict.get(kind)
    if getattr(kind, "__module__", "").partition(".")[0] != PACKAGE:
        return None
    return kind if isinstance(kind, type) else _class_behind(kind)


def _class_behind(function: Any) -> type | None:
    """The class that a registered function imports when it is called: that of its name in the module `head`
    beside it. None where mmdet, which these are built on, is missing."""
    try:
        head = importlib.import_module(f"{function.__module__.rpartition('.')[0]}.head")
    except ImportError:  # building it says what to install
        return None
    return getattr(head, function.__name__, None)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config can be meant for a parameter that is annotated with `hint`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if hint is bool:
        return isinstance(value, (bool, np.bool_))
    if hint in (int, float):
        kinds = (int, np.integer) if hint is int else (int, float, np.integer, np.floating)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, os.PathLike))
    if hint in (None, type(None)):
        return value is None
    if (origin or hint) is Mapping:
        return isinstance(value, Mapping)
    if (origin or hint) in (Sequence, list, tuple):
        return _fits_sequence(value, origin, inner)
    return True  # nothing is known of other annotations


def _fits_sequence(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    if isinstance(value, np.ndarray):
        value = list(value)
    if not isinstance(value, (list, tuple, range)):
        return False
    if origin is tuple and Ellipsis not in inner:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return all(fits(each, inner[0]) for each in value) if inner else True


def described(hint: Any) -> str:
    """What a value for `hint` is, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        parts = [described(each) for each in inner]
        return f"{', '.join(parts[:-1])} or {parts[-1]}"
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if (origin or hint) is Mapping:
        return "a dict(...)"
    if (origin or hint) in (Sequence, list, tuple):
        item = MANY.get(inner[0]) or MANY.get(typing.get_origin(inner[0])) or "values" if inner else "values"
        count = f"{len(inner)} " if origin is tuple and Ellipsis not in inner else ""
        return f"a list of {count}{item}"
    return WORDS.get(hint, "another value")
