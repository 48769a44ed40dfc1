"""Adam and AdamW over flat tensors along which learning rate and weight decay change, so that DeepSpeed needs
few parameter groups for many settings.

DeepSpeed updates one parameter group after the other. The some 100 groups of a layer-wise learning rate would
cost 100 all-reduces of norms in each step, and more time in Python than Adam's own work takes. Here DeepSpeed
sees one group, or a few where the fp32 gradients of a group, which ZeRO-1 and 2 make all at once, would be
too large. torch's own optimizer updates views of DeepSpeed's flat tensors, with a fused call for each
setting, and the result is the same to the last bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from internseg_ds.distributed.zero_internals import fp32_partitions, fragment_of
from internseg_ds.torch_internals import adam_step_count
from internseg_ds.zero_partition import full_shape

Range = tuple[int, int, int]
"""Elements [start, stop) of a flat tensor, and the number of their setting."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def bundles(sizes: Sequence[int], limit: float, kinds: Sequence[bool] | None = None) -> list[list[int]]:
    """Which settings share a parameter group of DeepSpeed's: for each group their numbers, in order.

    sizes: elements of each setting. limit: elements that a group may have together; a setting that is larger
    has a group of its own. kinds: of each setting; those of different kinds share no group. None: all are
    alike.
    """
    found: list[list[int]] = []
    kinds = kinds or [False] * len(sizes)
    for kind in dict.fromkeys(kinds):
        elements = math.inf
        for number, size in enumerate(sizes):
            if kinds[number] != kind:
                continue
            if elements + size > limit or elements == math.inf:
                found.append([])
                elements = 0
            found[-1].append(number)
            elements += size
    return found


def kinds_of(groups: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Of each setting, whether its parameters are matrices that Muon updates."""
    return [group.get("use_muon", False) for group in groups]


class RangedAdam(Optimizer):
    """The optimizer that DeepSpeed is given: each of its groups has the parameters of several settings, in
    order.

    `settings` is torch's optimizer with one group for each setting; the schedule changes their learning
    rates. Those groups hold parameters during `step` only. The state is kept here by flat tensor, as torch's
    Adam would keep it: step, exp_avg, exp_avg_sq.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], kind: type[Adam], limit: float, **arguments: Any
    ) -> None:
        """groups: one for each setting, with its params, lr and weight_decay. kind: torch.optim.Adam or
        AdamW, made with `arguments`. limit: as of `bundles`."""
        self.settings = kind(
            [{**group, "params": [nn.Parameter(torch.empty(0))]} for group in groups], **arguments
        )
        sizes = [sum(full_shape(param).numel() for param in group["params"]) for group in groups]
        bundled = [
            {"params": [param for number in numbers for param in groups[number]["params"]]}
            for numbers in bundles(sizes, limit, kinds_of(groups))
        ]
        super().__init__(bundled, dict(self.settings.defaults))
        for group in self.settings.param_groups:
            group["params"] = []
        self._ranges: dict[Tensor, list[Range]] = {}
        self._views: dict[Tensor, list[Tensor]] = {}

    def divide(self, ranges: Mapping[Tensor, Sequence[Range]]) -> None:
        """Sets which setting each element of each flat tensor has. Once, after DeepSpeed has made the
        tensors."""
        self._ranges = {flat: list(of_flat) for flat, of_flat in ranges.items()}

    @torch.no_grad()
    # torch's overloads have a result with a closure
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the flat tensors that the groups hold now and that have a gradient. closure: is not called;
        DeepSpeed passes none."""
        highest = max(setting["lr"] for setting in self.settings.param_groups)
        for group in self.param_groups:
            group["lr"] = highest  # what DeepSpeed's own monitors show
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update(flat, flat.grad)

    def _update(self, flat: Tensor, gradient: Tensor) -> None:
        """flat, gradient: 1-d, of the same size."""
        if not self._ranges[flat]:
            return
        views = self._current_views(flat)
        numbers = []
        for (start, stop, setting), view in zip(self._ranges[flat], views, strict=True):
            view.grad = gradient[start:stop]
            numbers.append(setting)
        self._step_views(views, numbers)

    def _step_views(self, views: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """torch's update of tensors that have a gradient, which it takes from them. numbers: of the setting of
        each."""
        groups = self.settings.param_groups
        for view, number in zip(views, numbers, strict=True):
            groups[number]["params"].append(view)
        try:
            # groups without parameters cost torch time
            self.settings.param_groups = [group for group in groups if group["params"]]
            self.settings.step()
        finally:
            self.settings.param_groups = groups
            for group in groups:
                group["params"] = []
            for view in views:
                view.grad = None

    def _current_views(self, flat: Tensor) -> list[Tensor]:
        """Views of the ranges of `flat`, whose state in `settings` is views of the state of `flat`. Made
        again when that state, or the memory of `flat`, was replaced (by a resume, by offloading)."""
        state = self.state[flat]
        if not state:
            state["step"] = adam_step_count(self, 0, flat.device)
            state |= {what: torch.zeros_like(flat) for what in MOMENTS}
        views = self._views.get(flat, [])
        if not views or not self._views_are_current(flat, views[0]):
            for view in views:
                del self.settings.state[view]
            self._views[flat] = views = self._make_views(flat)
        return views

    def _views_are_current(self, flat: Tensor, first: Tensor) -> bool:
        """first: the view of the first range, which begins where `flat` does."""
        state, known = self.state[flat], self.settings.state[first]
        return (
            known["step"] is state["step"]
            and known["exp_avg"].data_ptr() == state["exp_avg"].data_ptr()
            and first.data_ptr() == flat.data_ptr()
        )

    def _make_views(self, flat: Tensor) -> list[Tensor]:
        state = self.state[flat]
        views: list[Tensor] = []
        for start, stop, _ in self._ranges[flat]:
            view = flat.data[start:stop]
            # torch adds 1 to the count of every view: the first has that of `flat`, the others copies
            count = state["step"].clone() if views else state["step"]
            self.settings.state[view] = {
                "step": count,
                **{what: state[what][start:stop] for what in MOMENTS},
            }
            views.append(view)
        return views


def divide_by_settings(engine: Any, optimizer: RangedAdam, groups: Sequence[Mapping[str, Any]]) -> None:
    """Sets which elements of this rank's flat tensors belong to which of `groups`.

    engine: DeepSpeed's, initialised with `optimizer`. groups: those that `optimizer` was made with.
    """
    partitions = fp32_partitions(engine)
    # of each partition: first element of a fragment -> setting
    settings: list[dict[int, int]] = [{} for _ in partitions]
    for number, group in enumerate(groups):
        for param in group["params"]:
            if (fragment := fragment_of(engine, param)) is not None:
                settings[fragment.partition][fragment.offset] = number
    optimizer.divide(
        {
            flat: _merged_ranges(of_flat, flat.numel())
            for flat, of_flat in zip(partitions, settings, strict=True)
        }
    )


def _merged_ranges(settings: Mapping[int, int], size: int) -> list[Range]:
    """The ranges of a flat tensor of `size` elements, with neighbours of the same setting merged. Padding
    behind a fragment goes with it.

    settings: first element of each fragment -> its setting.
    """
    firsts = [next(run) for _, run in groupby(sorted(settings), key=settings.__getitem__)]
    return [(start, stop, settings[start]) for start, stop in pairwise([*firsts, size])]
