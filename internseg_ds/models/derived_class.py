"""A built module's class changed in one thing: a subclass made for it, which takes the class's place (`module.__class__ = ...`)."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def derived_class(
    owner: type[nn.Module], body: Mapping[str, Any], *, word: str = "", doc: str | None = None
) -> type[nn.Module]:
    """A subclass of `owner` with `body`, under the module and the qualified name of `owner`, by which DeepSpeed knows the blocks that it gathers as one.

    word: before the class's short name, as it is printed. doc: default that of `owner`.
    """
    place = {
        "__module__": owner.__module__,
        "__qualname__": owner.__qualname__,
        "__doc__": owner.__doc__ if doc is None else doc,
    }
    return type(f"{word}{owner.__name__}", (owner,), {**place, **body})
