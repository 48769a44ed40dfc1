"""Freezing parts of a segmentor by their names, as `engine.freeze` asks for: built models and meta ones alike."""

import difflib
import functools
from collections.abc import Sequence

from torch import nn

from internseg_ds.models.derived_class import derived_class


def freeze(segmentor: nn.Module, names: Sequence[str]) -> None:
    """Takes the parameters of the named modules (`backbone.layer1`), and named parameters, out of the training.

    A module that is named runs as in an evaluation, whatever mode the segmentor is in: its batch norms use the statistics that they have and
    keep them, and it drops nothing. Raises ValueError for a name that is none.
    """
    modules, params = dict(segmentor.named_modules()), dict(segmentor.named_parameters())
    for name in names:
        if name in params:
            params[name].requires_grad_(False)
        elif name and name in modules:
            module = modules[name]
            module.requires_grad_(False)
            module.__class__ = _frozen_class(type(module))
            module.eval()
        else:
            near = difflib.get_close_matches(name, [*modules, *params], n=1, cutoff=0.0)
            raise ValueError(f"the model has no part {name!r}; did you mean {near[0]!r}?")


@functools.cache
def _frozen_class(owner: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `owner` that stays in eval mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return owner.train(self, False)

    return derived_class(owner, {"train": train})
