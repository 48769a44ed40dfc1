"""Changing the behaviour of a built module by changing its class: a subclass made for it takes the place of
its class (`module.__class__ = ...`).

Why not wrap the module: a wrapper would put another name in front of every parameter below it. Why not
replace it: a new module would have to take over parameters, buffers, hooks and mode of the old one. Why not
set a method on the instance: `type(module)`, by which our code tells what a module does, and `print` would
not show it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

ModuleClass = type[nn.Module]


def derived_class(
    owner: ModuleClass,
    body: Mapping[str, Any],
    *,
    word: str = "",
    doc: str | None = None,
    bases: tuple[ModuleClass, ...] = (),
) -> ModuleClass:
    """Make a subclass of `owner` with the attributes and methods of `body`.

    It has the module and the qualified name of `owner`, because DeepSpeed knows by these the blocks whose
    parameters it gathers as one unit. word: prefix of the class's short name, which `print(module)` shows.
    doc: the docstring, default that of `owner`. bases: further ones behind `owner`, whose methods its own find by
    super().
    """
    names = {
        "__module__": owner.__module__,
        "__qualname__": owner.__qualname__,
        "__doc__": owner.__doc__ if doc is None else doc,
    }
    return type(f"{word}{owner.__name__}", (owner, *bases), {**names, **body})


def once_per_class(derive: Callable[[ModuleClass], ModuleClass]) -> Callable[[ModuleClass], ModuleClass]:
    """Cache what `derive` makes of a class, so that all modules of one class get the same derived class.

    (functools.cache does the same, but its type takes no classes that define `__hash__`, as nn.Module does.)
    """
    derived: dict[ModuleClass, ModuleClass] = {}

    def cached(owner: ModuleClass) -> ModuleClass:
        if owner not in derived:
            derived[owner] = derive(owner)
        return derived[owner]

    return cached
