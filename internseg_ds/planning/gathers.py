"""Which weights ZeRO-3 gathers during one micro-batch, and in how many collectives.

In: the order in which modules use their weights (`training_pass`) and DeepSpeed's settings. Out: the gathers, in order. The rules are those of DeepSpeed
0.19.8, `runtime/zero/partitioned_param_coordinator.py`, once it has seen a whole micro-batch: weights are gathered when they are needed and not there, and
some beforehand; they are given up after use, unless they are small, or needed again soon. Element counts are of whole parameters.
`gathers` gives the gathers alone, `gathered` also how many elements are there at once.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from internseg_ds.models.external_parameters import external_parameters
from internseg_ds.planning.training_pass import Use


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
    """Parameters up to this size stay whole, and are gathered once after each step."""
    model_persistence_threshold: float = float("inf")
    """What all of these may hold together."""
    leaf_classes: tuple[str, ...] = ()
    """Classes (module and name) whose modules are gathered as one: DeepSpeed's hooks sit on them and on nothing inside them."""

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
    kept, held = set(), 0
    for name, param in model.named_parameters():
        if (
            param.numel() <= settings.param_persistence_threshold
            and held + param.numel() <= settings.model_persistence_threshold
        ):
            kept.add(name)
            held += param.numel()
    return frozenset(kept)


@dataclass(frozen=True)
class Gathered:
    """made: the parameters of each all-gather of a micro-batch, in order. live: the most elements that are there at once, persistent ones left out."""

    made: list[tuple[str, ...]]
    live: int


def leaves(model: nn.Module, classes: Sequence[str]) -> list[str]:
    """Names of the outermost modules of these classes."""
    found: list[str] = []
    for name, module in model.named_modules():
        kind = type(module)
        if {f"{kind.__module__}.{kind.__qualname__}", kind.__name__} & set(classes) and not name.startswith(
            tuple(f"{leaf}." for leaf in found)
        ):
            found.append(name)
    return found


def gathers(model: nn.Module, uses: Sequence[Use], settings: GatherSettings) -> list[tuple[str, ...]]:
    """The parameters of each all-gather of a micro-batch, in order; persistent ones are there already.

    uses: of the micro-batch, as `training_pass` observed it for this model. A parameter appears as often as it is gathered.
    """
    return gathered(model, uses, settings).made


def gathered(model: nn.Module, uses: Sequence[Use], settings: GatherSettings) -> Gathered:
    """`gathers`, and what they pile up to."""
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    leaf_names = leaves(model, settings.leaf_classes)
    uses = (
        [use for use in uses if not use.module.startswith(tuple(f"{leaf}." for leaf in leaf_names))]
        if leaf_names
        else uses
    )

    def params_of(recurse: bool) -> dict[str, list[str]]:
        return {
            name: [
                f"{name}.{own}" if name else own
                for own in (
                    *dict(module.named_parameters(recurse=recurse)),
                    *(() if recurse else external_parameters(module)),
                )
            ]
            for name, module in model.named_modules()
        }

    held = params_of(recurse=True) if leaf_names else {}
    owned = params_of(recurse=False) | {leaf: held[leaf] for leaf in leaf_names}
    order = [use.module for use in uses if use.begins]
    keep = persistent(model, settings)
    whole, live, most = set(keep), 0, 0
    in_use: dict[str, set[str]] = {name: set() for name in sizes}
    ahead = deque((param, step) for step, module in enumerate(order) for param in owned[module])
    last_seen: Counter[str] = Counter(
        {name: -1 for name in sizes}
    )  # the step up to which a parameter's needs have been looked at
    step, made = 0, []

    def gather(params: list[str]) -> int:
        missing = [param for param in params if param not in whole]
        if missing:
            made.append(tuple(missing))
            whole.update(missing)
        return sum(sizes[param] for param in missing)

    def needed_soon(start: int, by_module: Mapping[str, list[str]]) -> set[str]:
        found: set[str] = set()
        passed = 0
        for module in order[start:]:
            if passed >= settings.max_reuse_distance:
                break
            found.update(by_module[module])
            passed += sum(sizes[param] for param in by_module[module])
        return found

    for use in uses:
        mine = owned[use.module]
        if use.begins:
            live += gather(mine)
            for param in mine:
                in_use[param].add(use.module)
            for _ in [param for param in mine if last_seen[param] < step]:
                param, last_seen_at = ahead.popleft()
                last_seen[param] = last_seen_at
            wanted: list[str] = []
            room = min(settings.max_live_parameters - live, settings.prefetch_bucket_size)
            while ahead and sum(sizes[param] for param in wanted) < room:
                param, needed_at = ahead.popleft()
                last_seen[param] = max(last_seen[param], needed_at)
                if param not in whole and param not in wanted:
                    wanted.append(param)
            live += gather(wanted)
            most = max(most, live)
            step += 1
        else:
            soon = needed_soon(
                step, held if use.module in leaf_names else owned
            )  # for a leaf DeepSpeed looks into all that follows, containers too
            for param in mine:
                in_use[param].discard(use.module)
                if (
                    param in whole
                    and param not in keep
                    and param not in soon
                    and last_seen[param] <= step
                    and not in_use[param]
                ):
                    whole.remove(param)
                    live -= sizes[param]
    return Gathered(made, most)
