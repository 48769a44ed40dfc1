"""Freezing parts of a segmentor by name, as `engine.freeze` asks for. Works on models on the meta device
too."""

import difflib
from collections.abc import Collection, Sequence

from torch import nn

from internseg_ds.lora_names import plain_name
from internseg_ds.models.derived_class import ModuleClass, derived_class, once_per_class
from internseg_ds.torch_internals import NORM_WITH_MOMENTS


def freeze(segmentor: nn.Module, names: Sequence[str]) -> None:
    """Freeze the named modules ("backbone.layer1") and the named parameters.

    A named module stays in eval mode whatever mode the segmentor is in: its batch norms use their running
    statistics and do not update them, and its dropout and drop-path layers do nothing. A named parameter does
    not train, and its module runs as before; names are those without low-rank adapters, and the adapter of a
    weight that is named does not train either. Raises ValueError for a name that the model does not have.
    """
    modules = dict(segmentor.named_modules())
    params: dict[str, list[nn.Parameter]] = {}
    for name, param in segmentor.named_parameters():
        for known_as in {name, plain_name(name)}:
            params.setdefault(known_as, []).append(param)
    for name in names:
        if name in params:
            for param in params[name]:
                param.requires_grad_(False)
        elif name and name in modules:  # "" is the segmentor itself
            modules[name].requires_grad_(False)
            _stay_in_eval(modules[name])
        else:
            near = difflib.get_close_matches(name, [*modules, *params], n=1, cutoff=0.0)
            raise ValueError(f"the model has no part {name!r}; did you mean {near[0]!r}?")


def keep_in_eval(module: nn.Module, units: Collection[nn.Module]) -> None:
    """Keep each part of `module` in eval mode, whatever mode the rest is in, of whose parameters none trains.

    Parts without parameters follow the part around them, and so does what lies in one of `units` (blocks)
    that trains in part: dropout is the same all over a block. Its norms with moments keep theirs.
    """
    params = list(module.parameters())
    if params and not any(param.requires_grad for param in params):
        _stay_in_eval(module)
    elif module not in units:
        for child in module.children():
            keep_in_eval(child, units)
    else:
        for norm in module.modules():
            if isinstance(norm, NORM_WITH_MOMENTS):
                keep_in_eval(norm, ())


def _stay_in_eval(module: nn.Module) -> None:
    # eval() alone would be undone by the segmentor's train(), which every evaluation ends with
    module.__class__ = _frozen_class(type(module))
    module.eval()


@once_per_class
def _frozen_class(owner: ModuleClass) -> ModuleClass:
    """A subclass of `owner` that stays in eval mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return owner.train(self, False)

    return derived_class(owner, {"train": train})
