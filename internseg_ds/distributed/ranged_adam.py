"""Adam and AdamW over flat tensors along which learning rate and weight decay change, so that DeepSpeed needs few parameter groups for many settings.

DeepSpeed updates one group after the other. The some 100 of a layer-wise learning rate would cost 100 all-reduces of norms a step, and more Python than
Adam's own work takes. Here DeepSpeed sees one group, or a few where a group's fp32 gradients, which ZeRO-1 and 2 make all at once, would be too large;
torch's own optimizer updates views of its flat tensors, a fused call for each setting, and gives the same result to the last bit.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from internseg_ds.distributed.parameter_groups import full_shape
from internseg_ds.distributed.partitions import partitions, place_of

Range = tuple[int, int, int]
"""Elements [start, stop) of a flat tensor, and the number of their setting."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def bundles(sizes: Sequence[int], limit: float) -> list[list[int]]:
    """Numbers of settings that share a group of DeepSpeed's, in their order: of as many as stay within `limit` elements together, or of one that is larger."""
    found: list[list[int]] = []
    held = 0
    for number, size in enumerate(sizes):
        if not found or held + size > limit:
            found.append([])
            held = 0
        found[-1].append(number)
        held += size
    return found


class RangedAdam(Optimizer):
    """What DeepSpeed is given: groups with the parameters of several settings each, in their order.

    `settings` is torch's optimizer with a group for each setting, whose learning rates the schedule moves. Its groups hold parameters during `step` only.
    State lies under the flat tensors, as torch's Adam would keep it: step, exp_avg, exp_avg_sq.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], kind: type[Adam], limit: float, **arguments: Any
    ) -> None:
        """groups: of parameters, one for each setting, with its lr and weight_decay. kind: torch.optim.Adam or AdamW, made with `arguments`. limit: elements
        that a group of DeepSpeed's may have, where it holds several settings."""
        self.settings = kind(
            [{**group, "params": [nn.Parameter(torch.empty(0))]} for group in groups], **arguments
        )
        sizes = [sum(full_shape(param).numel() for param in group["params"]) for group in groups]
        super().__init__(
            [
                {"params": [param for number in numbers for param in groups[number]["params"]]}
                for numbers in bundles(sizes, limit)
            ],
            dict(self.settings.defaults),
        )
        for group in self.settings.param_groups:
            group["params"] = []
        self._ranges: dict[Tensor, list[Range]] = {}
        self._parts: dict[Tensor, list[Tensor]] = {}

    def divide(self, ranges: Mapping[Tensor, Sequence[Range]]) -> None:
        """Which setting each element of each flat tensor has. Once, after DeepSpeed has made them."""
        self._ranges = {flat: list(its) for flat, its in ranges.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates the flat tensors that the groups hold now and that have a gradient. Takes no closure, as DeepSpeed gives none."""
        highest = max(setting["lr"] for setting in self.settings.param_groups)
        for group in self.param_groups:
            group["lr"] = highest  # what DeepSpeed's own monitors show
            for flat in group["params"]:
                if flat.grad is not None and self._ranges[flat]:
                    self._update(flat)

    def _update(self, flat: Tensor) -> None:
        groups = self.settings.param_groups
        for (start, stop, setting), part in zip(self._ranges[flat], self._linked(flat), strict=True):
            part.grad = flat.grad[start:stop]
            groups[setting]["params"].append(part)
        try:
            self.settings.param_groups = [
                group for group in groups if group["params"]
            ]  # torch would look into empty ones too
            self.settings.step()
        finally:
            self.settings.param_groups = groups
            for group in groups:
                group["params"] = []
            for part in self._parts[flat]:
                part.grad = None

    def _linked(self, flat: Tensor) -> list[Tensor]:
        """Views of the ranges of `flat`, whose state in `settings` is views of the state of `flat`. Made anew where that, or its memory, is another one."""
        state = self.state[flat]
        if not state:
            on_device = self.defaults.get("fused") or self.defaults.get(
                "capturable"
            )  # as torch's Adam has it: elsewhere it reads the count on the host
            state |= {"step": torch.zeros((), device=flat.device if on_device else "cpu")} | {
                what: torch.zeros_like(flat) for what in MOMENTS
            }
        parts = self._parts.get(flat, [])
        known = self.settings.state[parts[0]] if parts else None
        if (
            known is None
            or known["step"] is not state["step"]
            or known["exp_avg"].data_ptr() != state["exp_avg"].data_ptr()
            or parts[0].data_ptr() != flat.data_ptr()
        ):
            for part in parts:
                del self.settings.state[part]
            self._parts[flat] = parts = [flat.data[start:stop] for start, stop, _ in self._ranges[flat]]
            for number, (part, (start, stop, _)) in enumerate(zip(parts, self._ranges[flat])):
                self.settings.state[part] = {
                    what: state[what][start:stop] for what in MOMENTS
                }  # each counts its own steps: torch adds one for each
                self.settings.state[part]["step"] = state["step"].clone() if number else state["step"]
        return parts


def divide_by_settings(engine: Any, optimizer: RangedAdam, groups: Sequence[Mapping[str, Any]]) -> None:
    """Tells the optimizer which elements of this rank's flat tensors belong to which of `groups`. engine: DeepSpeed's, initialised."""
    starts: list[dict[int, int]] = [{} for _ in partitions(engine)]
    for number, group in enumerate(groups):
        for param in group["params"]:
            if (place := place_of(engine, param)) is not None:
                starts[place.partition][place.offset] = number
    ranges: dict[Tensor, list[Range]] = {}
    for flat, begins in zip(partitions(engine), starts, strict=True):
        firsts = [
            next(run) for _, run in groupby(sorted(begins), key=begins.__getitem__)
        ]  # of neighbours with one setting
        ranges[flat] = [
            (start, stop, begins[start]) for start, stop in pairwise([*firsts, flat.numel()])
        ]  # padding behind a parameter goes with it
    optimizer.divide(ranges)
