"""Adam and AdamW whose moments are held in bf16 or in 8 bits, over flat tensors in fp32 or in bf16.

An update goes through a flat tensor in chunks: moments, gradient and weights of a chunk become fp32, torch's
own optimizer updates them, and they are rounded back, stochastically (`moment_formats`). So no more than a
chunk is ever held in fp32. Where DeepSpeed holds the weights in bf16 alone (`bf16_master_weights_and_grads`),
the new weights are rounded in this way too: to the nearest, most updates of a usual learning rate would leave
a bf16 weight as it was.

The noise follows from the rank, the tensor and the count of updates: a run that is resumed under the same
stage on as many processes goes on as it would have.

Other libraries' 8-bit optimizers do not serve here. torchao's (0.18) keeps a tensor of n elements in fp32
unless n is a multiple of 256, and its state cannot be narrowed but between blocks, as DeepSpeed and a resume
do by parameter; and one tensor has one learning rate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam

from internseg_ds.moment_formats import (
    BLOCK,
    CODES,
    EAGER,
    SCALE,
    OptimizerStates,
    compiled_kernels,
    from_bytes,
    rounded_to_bf16,
    scales_of,
    to_bytes,
)
from internseg_ds.optimization.ranged_adam import MOMENTS, Range, RangedAdam
from internseg_ds.seeding import derived_seed
from internseg_ds.torch_internals import adam_step_count

CHUNK = 2**23
"""Elements that are in fp32 at once; whole blocks."""


class CompactAdam(RangedAdam):
    """`RangedAdam` whose state of a flat tensor is: step, and exp_avg and exp_avg_sq in bf16 ("bf16"), or in
    uint8 with fp32 scales beside them, exp_avg_scale and exp_avg_sq_scale ("8bit")."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        kind: type[Adam],
        limit: float,
        states: OptimizerStates,
        *,
        compiled: bool = False,
        **arguments: Any,
    ) -> None:
        """states: "bf16" or "8bit". compiled: whether moments and weights are converted by compiled
        functions, to the same values. The others as of `RangedAdam`."""
        super().__init__(groups, kind, limit, **arguments)
        self.states = states
        self._kernels = compiled_kernels() if compiled else EAGER
        # of each flat tensor: the count in its state, and its value, which costs a wait for the GPU to read
        self._updates: dict[Tensor, tuple[Tensor, int]] = {}
        self._numbers: dict[Tensor, int] = {}

    def divide(self, ranges: Mapping[Tensor, Sequence[Range]]) -> None:
        super().divide(ranges)
        self._numbers = {flat: number for number, flat in enumerate(ranges)}

    def empty_moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The moments of a flat tensor before its first update."""
        found: dict[str, Tensor] = {}
        for what in MOMENTS:
            dtype = torch.bfloat16 if self.states == "bf16" else torch.uint8
            found[what] = torch.zeros(flat.numel(), dtype=dtype, device=flat.device)
            if self.states == "8bit":
                found[what + SCALE] = torch.zeros(scales_of(flat.numel()), device=flat.device)
        return found

    @torch.no_grad()
    def set_moment(self, flat: Tensor, what: str, values: Tensor) -> None:
        """Puts a moment of `flat` into its state, rounded to the nearest: what was saved in the same format
        comes back as it was. values: (elements of flat,), fp32, on any device."""
        for start in range(0, flat.numel(), CHUNK):
            stop = min(start + CHUNK, flat.numel())
            self._hold(flat, what, start, values[start:stop].to(flat.device), None)

    def _update(self, flat: Tensor, gradient: Tensor) -> None:
        state = self.state[flat]
        if not state:
            state["step"] = adam_step_count(self, 0, flat.device)
            state |= self.empty_moments(flat)
        noise = self._noise(flat)
        for start in range(0, flat.numel(), CHUNK):
            stop = min(start + CHUNK, flat.numel())
            held = flat.data[start:stop]
            weights = held.float()  # itself, where it is fp32
            moments = {what: self._moment(flat, what, start, stop) for what in MOMENTS}
            self._update_chunk(flat, start, weights, gradient[start:stop].float(), moments)
            if weights is not held:
                held.copy_(rounded_to_bf16(weights, noise, self._kernels))
            for what, values in moments.items():
                self._hold(flat, what, start, values, noise)
        state["step"] += 1

    def _update_chunk(
        self, flat: Tensor, start: int, weights: Tensor, gradient: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        """torch's update of the elements from `start` on, in place. weights, gradient, each moment: fp32,
        1-d, of the same size."""
        stop = start + weights.numel()
        views, numbers = [], []
        for first, last, setting in self._ranges[flat]:
            part = slice(max(first, start) - start, min(last, stop) - start)
            if part.start >= part.stop:
                continue
            view = weights[part]
            view.grad = gradient[part]
            views.append(view)
            numbers.append(setting)
            self.settings.state[view] = {
                "step": self.state[flat]["step"].clone(),
                **{what: values[part] for what, values in moments.items()},
            }
        try:
            self._step_views(views, numbers)
        finally:
            self.settings.state.clear()

    def _noise(self, flat: Tensor) -> torch.Generator:
        count = self.state[flat]["step"]
        known, updates = self._updates.get(flat, (None, 0))
        if known is not count:  # the first update, or the first after a resume
            updates = int(count)
        self._updates[flat] = count, updates + 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        seed = derived_seed("rounding", rank, self._numbers[flat], updates)
        return torch.Generator(flat.device).manual_seed(seed)

    def _moment(self, flat: Tensor, what: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a moment, in fp32, a fresh tensor. start: of a block."""
        state = self.state[flat]
        if self.states == "bf16":
            return state[what][start:stop].float()
        scales = state[what + SCALE][start // BLOCK : scales_of(stop)]
        return from_bytes(state[what][start:stop], scales, CODES[what], self._kernels)

    def _hold(
        self, flat: Tensor, what: str, start: int, values: Tensor, noise: torch.Generator | None
    ) -> None:
        """Puts values (fp32, 1-d) into the state from element `start` on, the first of a block."""
        state, stop = self.state[flat], start + values.numel()
        if self.states == "bf16":
            state[what][start:stop] = rounded_to_bf16(values, noise, self._kernels)
            return
        codes, scales = to_bytes(values, CODES[what], noise, self._kernels)
        state[what][start:stop] = codes
        state[what + SCALE][start // BLOCK : scales_of(stop)] = scales
