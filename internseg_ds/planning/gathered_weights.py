"""Which weights ZeRO-3 gathers during one micro-batch, and in how many collectives.

In: the order in which modules use their weights (`TrainingPass` of `flops`) and DeepSpeed's settings. Out: the gathers,
in order, and how many elements are there at once. The rules are those of DeepSpeed 0.19.8,
`runtime/zero/partitioned_param_coordinator.py`, once it has recorded a whole micro-batch: weights are gathered
when they are needed and not there, and some ahead of their use; they are released after use, unless they are
small, or needed again soon. Element counts are of whole parameters.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from internseg_ds.distributed.zero_internals import leaf_class_names
from internseg_ds.models.external_parameters import external_parameters
from internseg_ds.planning.flops import Use


@dataclass(frozen=True)
class GatherSettings:
    """Elements. The defaults are DeepSpeed's own."""

    prefetch_bucket_size: int = 50_000_000
    """Gathered ahead in one go, at least, when so much is missing."""
    max_live_parameters: int = 1_000_000_000
    """Nothing is gathered ahead above this."""
    max_reuse_distance: int = 1_000_000_000
    """Weights are kept when modules with fewer elements than this run before they are needed again."""
    param_persistence_threshold: int = 100_000
    """Parameters up to this size stay whole until the step; after it they are gathered again, frozen ones
    where a module next uses them (`distributed.zero_internals.gather_frozen_where_used`)."""
    model_persistence_threshold: float = float("inf")
    """What all of these may hold together."""
    leaf_classes: tuple[str, ...] = ()
    """Classes (module and name) whose modules are gathered as one: DeepSpeed's hooks are on them and on
    nothing inside them."""

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> "GatherSettings":
        """zero: the `zero_optimization` section of a ds_config without "auto" values."""
        names = {
            "prefetch_bucket_size": "stage3_prefetch_bucket_size",
            "max_live_parameters": "stage3_max_live_parameters",
            "max_reuse_distance": "stage3_max_reuse_distance",
            "param_persistence_threshold": "stage3_param_persistence_threshold",
            "model_persistence_threshold": "stage3_model_persistence_threshold",
        }
        return cls(
            **{ours: int(float(zero[key])) for ours, key in names.items() if key in zero},
            leaf_classes=tuple(zero.get("leaf_module", {}).get("classes", ())),
        )


def persistent(model: nn.Module, settings: GatherSettings) -> frozenset[str]:
    """Names of the parameters that stay whole on every rank."""
    kept: set[str] = set()
    held = 0
    for name, param in model.named_parameters():
        if (
            param.numel() <= settings.param_persistence_threshold
            and held + param.numel() <= settings.model_persistence_threshold
        ):
            kept.add(name)
            held += param.numel()
    return frozenset(kept)


def leaves(model: nn.Module, classes: Sequence[str]) -> list[str]:
    """Names of the outermost modules of these classes."""
    found: list[str] = []
    for name, module in model.named_modules():
        kind = type(module)
        if leaf_class_names(kind) & set(classes) and not name.startswith(_inside(found)):
            found.append(name)
    return found


@dataclass(frozen=True)
class Gathers:
    """calls: the parameters of each all-gather of a micro-batch, in order; a parameter appears as often as it
    is gathered. most_live: the most elements that are there at once, without persistent parameters."""

    calls: list[tuple[str, ...]]
    most_live: int


def gathers(
    model: nn.Module, uses: Sequence[Use], settings: GatherSettings, *, first: bool = True
) -> Gathers:
    """The all-gathers of one micro-batch. uses: as `training_pass` observed them for this model. first:
    whether it is the first of a step, in which persistent parameters that are frozen are gathered."""
    leaf_names = leaves(model, settings.leaf_classes)
    hooked = [use for use in uses if not use.module.startswith(_inside(leaf_names))]
    order = [use.module for use in hooked if use.begins]
    coordinator = _Coordinator(model, order, settings, leaf_names, first=first)
    for use in hooked:
        if use.begins:
            coordinator.begin(use.module)
        else:
            coordinator.end(use.module)
    return Gathers(coordinator.calls, coordinator.most_live)


class _Coordinator:
    """DeepSpeed's `PartitionedParameterCoordinator` after its first micro-batch, on names and sizes.

    order: the modules with hooks in the order in which they begin; a step is an index into it. first: see
    `gathers`. calls, most_live: see `Gathers`.
    """

    def __init__(
        self,
        model: nn.Module,
        order: Sequence[str],
        settings: GatherSettings,
        leaf_names: Sequence[str],
        *,
        first: bool,
    ) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.most_live = 0
        self._settings = settings
        self._order = order
        self._step = 0
        self._leaves = frozenset(leaf_names)
        self._sizes = {name: param.numel() for name, param in model.named_parameters()}
        self._held = _parameters_inside(model) if leaf_names else {}
        self._owned = _parameters_used_by(model) | {leaf: self._held[leaf] for leaf in leaf_names}
        self._persistent = persistent(model, settings)
        self._whole = {
            name
            for name, param in model.named_parameters()
            if name in self._persistent and (param.requires_grad or not first)
        }
        self._live = 0
        self._users: dict[str, set[str]] = {name: set() for name in self._sizes}
        """Of each parameter, the modules that run now and need it."""
        self._ahead = deque(
            (param, step) for step, module in enumerate(order) for param in self._owned[module]
        )
        """What will be needed and at which step, from where prefetching has got to."""
        self._looked_up_to: Counter[str] = Counter({name: -1 for name in self._sizes})
        """Of each parameter, the last step at which it is needed that prefetching has got to."""

    def begin(self, module: str) -> None:
        """`fetch_sub_module`: gathers what `module` needs, then ahead of later modules."""
        params = self._owned[module]
        self._gather(params)
        for param in params:
            self._users[param].add(module)
        self._skip_in_queue(params)
        self._gather(self._to_prefetch())
        self.most_live = max(self.most_live, self._live)
        self._step += 1

    def end(self, module: str) -> None:
        """`release_sub_module`: releases what `module` needed and nothing needs soon."""
        # for a leaf module DeepSpeed looks at all parameters of the modules that follow, containers too
        soon = self._needed_soon(self._held if module in self._leaves else self._owned)
        for param in self._owned[module]:
            self._users[param].discard(module)
            may_go = param in self._whole and param not in self._persistent and not self._users[param]
            if may_go and param not in soon and self._looked_up_to[param] <= self._step:
                self._whole.remove(param)
                self._live -= self._sizes[param]

    def _gather(self, params: Sequence[str]) -> None:
        missing = tuple(param for param in params if param not in self._whole)
        if missing:
            self.calls.append(missing)
            self._whole.update(missing)
            self._live += sum(self._sizes[param] for param in missing if param not in self._persistent)

    def _skip_in_queue(self, params: Sequence[str]) -> None:
        """Takes from the queue as many entries as this step has parameters that prefetching had not got
        to."""
        for _ in [param for param in params if self._looked_up_to[param] < self._step]:
            param, step = self._ahead.popleft()
            self._looked_up_to[param] = step

    def _to_prefetch(self) -> list[str]:
        wanted: list[str] = []
        room = min(self._settings.max_live_parameters - self._live, self._settings.prefetch_bucket_size)
        while self._ahead and sum(self._sizes[param] for param in wanted) < room:
            param, step = self._ahead.popleft()
            self._looked_up_to[param] = max(self._looked_up_to[param], step)
            if param not in self._whole and param not in wanted:
                wanted.append(param)
        return wanted

    def _needed_soon(self, by_module: Mapping[str, Sequence[str]]) -> set[str]:
        """What modules need that begin within `max_reuse_distance` elements from now on."""
        found: set[str] = set()
        distance = 0
        for module in self._order[self._step :]:
            if distance >= self._settings.max_reuse_distance:
                break
            found.update(by_module[module])
            distance += sum(self._sizes[param] for param in by_module[module])
        return found


def _inside(modules: Sequence[str]) -> tuple[str, ...]:
    """The prefixes of names inside these modules."""
    return tuple(f"{name}." for name in modules)


def _parameters_inside(model: nn.Module) -> dict[str, list[str]]:
    """Of each module by name: the names of all parameters that it and its children own."""
    return {
        name: [_joined(name, own) for own, _ in module.named_parameters()]
        for name, module in model.named_modules()
    }


def _parameters_used_by(model: nn.Module) -> dict[str, list[str]]:
    """Of each module by name: the names of the parameters that it owns itself, and of children's that it
    reads."""
    return {
        name: [
            *(_joined(name, own) for own, _ in module.named_parameters(recurse=False)),
            *(_joined(name, own) for own in external_parameters(module)),
        ]
        for name, module in model.named_modules()
    }


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
