"""Which tensor of a weight file goes to which parameter of a model, and how it is resized: decided from names
and shapes, before any value is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from internseg_ds.checkpoints.weights import Weights
from internseg_ds.errors import CheckpointError, counted, shortened
from internseg_ds.models.weight_resizing import channels_rule

CanResize = Callable[[torch.Size, torch.Size], bool]
"""(shape in the file, shape in the model) -> whether the backbone resizes the one to the other."""

ALLOW = ", or let what differs keep its initial values with engine.weights_may_differ=[PREFIX, ...]"


@dataclass
class KeyMatch:
    """weights: the file. sources: name in the model -> name in the file, for what is loaded; resized,
    missing, ignored: names for the report."""

    weights: Weights
    sources: dict[str, str] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    """How kernels become those for images of other channels."""

    def summary(self, done: str = "loaded") -> str:
        """How many tensors are `done`, and which are not, for the log."""
        parts = [f"{counted(len(self.sources), 'tensor')} {done}"]
        for what in ("resized", "missing", "ignored"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what} ({shortened(names)})")
        return ", ".join(parts + self.rules)


def match_keys(
    weights: Weights,
    shapes: Mapping[str, torch.Size],
    *,
    prefix: str = "",
    resizable: Mapping[str, CanResize] = {},
    ignore: tuple[str, ...] = (),
    may_miss: tuple[str, ...] = (),
    advice: str = ALLOW,
) -> KeyMatch:
    """Matches the tensors of a file with those of a model.

    shapes: name -> shape of everything in the model that is to be loaded. prefix: of the names in the file
    ("backbone."); what does not start with it is ignored when the prefix is not empty. resizable: name ->
    whether a shape in the file can be brought to the model's. ignore: prefixes of names that the file may
    have and the model need not. may_miss: prefixes of names in the model that the file may lack; they keep
    their values, and so do those that are under both and have another shape in the file. advice: what to do
    beside using the config that the weights were made with, for the error message.

    Raises CheckpointError naming the keys that are unexpected, missing, or of another shape.
    """
    match = KeyMatch(weights)
    unexpected: list[str] = []
    other_shape: list[str] = []
    for source, shape in weights.shapes.items():
        name = source.removeprefix(prefix)
        if not source.startswith(prefix) or (name not in shapes and name.startswith(ignore)):
            match.ignored.append(source)
        elif name not in shapes:
            unexpected.append(source)
        elif _same_shape(shape, shapes[name]):
            match.sources[name] = source
        elif name in resizable and resizable[name](shape, shapes[name]):
            match.sources[name] = source
            match.resized.append(name)
            if rule := channels_rule(shape, shapes[name]):
                match.rules.append(f"{name} {rule}")
        elif name.startswith(ignore) and name.startswith(may_miss):
            match.ignored.append(source)
        else:
            other_shape.append(name)
    match.missing = [name for name in shapes if name not in match.sources]
    if other_shape:
        raise _other_shape_error(weights, shapes, prefix, other_shape, advice)
    missing = [name for name in match.missing if not name.startswith(may_miss)]
    if unexpected or missing:
        raise CheckpointError(
            f"{weights.path} does not fit the model: unexpected in the file: "
            f"{shortened(unexpected) or 'nothing'}; missing from it: {shortened(missing) or 'nothing'}; use "
            f"the config that these weights were made with{advice}"
        )
    return match


def _same_shape(in_file: torch.Size, in_model: torch.Size) -> bool:
    """Parameters without dimensions are vectors of one element here (`distributed.construction`)."""
    return in_file == in_model or (in_file == () and in_model == (1,))


def _other_shape_error(
    weights: Weights, shapes: Mapping[str, torch.Size], prefix: str, names: list[str], advice: str
) -> CheckpointError:
    """names: in the model."""
    first = names[0]
    return CheckpointError(
        f"{weights.path} does not fit the model: {first} is {list(weights.shapes[prefix + first])} in the "
        f"file and {list(shapes[first])} in the model "
        f"({counted(len(names), 'tensor differs', 'tensors differ')}: {shortened(names)}); use "
        f"the config that these weights were made with{advice}"
    )
