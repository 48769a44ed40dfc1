"""Which tensor of a weight file goes to which parameter of a model, and how it is resized: decided from names and shapes, before any value is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from internseg_ds.checkpoints.weights import Weights
from internseg_ds.errors import CheckpointError, shortened

CanResize = Callable[[torch.Size, torch.Size], bool]


@dataclass
class Fit:
    """weights: the file. sources: name in the model -> name in the file, for what is loaded; resized, missing, ignored: names for the report."""

    weights: Weights
    sources: dict[str, str] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def summary(self, done: str = "loaded") -> str:
        """How many tensors are `done`, and which are not, for the log."""
        parts = [f"{len(self.sources)} tensors {done}"]
        for what in ("resized", "missing", "ignored"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what} ({shortened(names)})")
        return ", ".join(parts)


def fit(
    weights: Weights,
    shapes: Mapping[str, torch.Size],
    *,
    prefix: str = "",
    resizable: Mapping[str, CanResize] = {},
    ignore: tuple[str, ...] = (),
    may_miss: tuple[str, ...] = (),
) -> Fit:
    """Matches a file with a model.

    shapes: name -> shape of everything in the model that is to be loaded. prefix: of the names in the file ("backbone."); what does not start with it is
    ignored when the prefix is not empty. resizable: name -> whether a shape in the file can be brought to the model's. ignore: prefixes of names that the file
    may have and the model need not. may_miss: prefixes of names in the model that the file may lack; they keep their values, and so do those that are under
    both and have another shape in the file.

    Raises CheckpointError naming the keys that are unexpected, missing, or of another shape.
    """
    found, extra, wrong = Fit(weights), [], []
    for source, shape in weights.shapes.items():
        name = source.removeprefix(prefix)
        if not source.startswith(prefix) or (name not in shapes and name.startswith(ignore)):
            found.ignored.append(source)
        elif name not in shapes:
            extra.append(source)
        elif shape == shapes[name] or (
            shape == () and shapes[name] == (1,)
        ):  # parameters without dimensions are vectors here (`construction`)
            found.sources[name] = source
        elif name in resizable and resizable[name](shape, shapes[name]):
            found.sources[name] = source
            found.resized.append(name)
        elif name.startswith(ignore) and name.startswith(may_miss):
            found.ignored.append(source)
        else:
            wrong.append((name, source))
    found.missing = [name for name in shapes if name not in found.sources]
    lacking = [name for name in found.missing if not name.startswith(may_miss)]
    if wrong:
        name, source = wrong[0]
        raise CheckpointError(
            f"{weights.path} does not fit the model: {name} is {list(weights.shapes[source])} in the file and {list(shapes[name])} in "
            f"the model ({len(wrong)} tensors differ: {shortened([name for name, _ in wrong])}); use the config that these weights were made "
            "with, or let what differs keep its initial values with engine.weights_may_differ=[PREFIX, ...]"
        )
    if extra or lacking:
        raise CheckpointError(
            f"{weights.path} does not fit the model: unexpected in the file: {shortened(extra) or 'nothing'}; missing from it: "
            f"{shortened(lacking) or 'nothing'}; use the config that these weights were made with, or allow names with "
            "engine.weights_may_differ=[PREFIX, ...]"
        )
    return found
