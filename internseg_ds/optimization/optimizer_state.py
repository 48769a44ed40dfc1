"""What an optimizer keeps of its parameters, found by letting it update small tensors.

ZeRO updates flat pieces of parameters, and a resume cuts these pieces anew. So an optimizer works here if each
element of its update depends on that element alone, and if its state is made of such elements and of counts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internseg_ds.errors import ConfigError, reason_of

SHAPES = ((128, 80), (128, 20, 2, 2))
"""Of the tensors that it is tried with: a matrix, and the kernels of a convolution, which some optimizers treat
otherwise. Half of one has more elements than any library treats as a small tensor: bitsandbytes keeps the state
of fewer than 4,096 in fp32."""
SIZE = math.prod(SHAPES[0])
PIECES = ((SIZE // 2,), (SIZE // 2,))
LR = 0.1
"""Learning rate of the trial, whatever that of the run: updates must not drown in the rounding of weights."""
ROUNDS = 2
"""How often each kind of gradient comes: the first update of an optimizer may be unlike all others."""


@dataclass(frozen=True)
class OptimizerState:
    """moments: names of what it keeps of each element. counts: what it keeps once for a tensor, with their
    types (a tensor without dimensions, or a number)."""

    moments: tuple[str, ...]
    counts: Mapping[str, Any]


def optimizer_state(kind: type[torch.optim.Optimizer], settings: Mapping[str, Any]) -> OptimizerState:
    """The state of an optimizer of class `kind`, made with `settings`.

    Raises ConfigError where it cannot update a tensor by its gradient alone, where its update of a tensor is
    not that of its pieces, and where its state is of another kind.
    """
    settings = {**settings, **({"lr": LR} if "lr" in settings else {})}
    whole = _Trial(kind, settings, SHAPES[:1])
    slower = {**settings, "lr": 0.5 * whole.optimizer.defaults.get("lr", 1.0)}
    slowly = _Trial(kind, slower, SHAPES[:1])
    others: list[_Trial] = []
    for step in range(ROUNDS * len(KINDS)):
        gradient = _gradient(step, whole.weights())
        whole.step(gradient)
        slowly.step(gradient)
        try:
            others = others or [_Trial(kind, settings, shapes) for shapes in (PIECES, SHAPES[1:])]
            same = all(_are_close(other.step(gradient), whole.weights()) for other in others)
        except ConfigError:
            same = False
        if not same:
            raise ConfigError(
                f"optimizer {kind.__name__} looks at tensors as a whole (their norm, their rows and columns), and "
                "ZeRO gives it flat pieces of them; use one that updates each element by itself, such as AdamW or "
                "SGD"
            )
    state = _state_of(whole.optimizer, kind, settings)
    slow = _state_of(slowly.optimizer, kind, slower).counts
    for name, value in state.counts.items():
        if value != slow[name]:
            raise ConfigError(
                f"optimizer {kind.__name__} keeps {name!r}, which follows the learning rate of each group; a "
                "resumed run would have that of one group in all; use AdamW or SGD"
            )
    return state


def _are_close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether weights agree, within the rounding of what has been added to them."""
    moved = float((theirs - _start()).abs().max())
    return torch.allclose(ours, theirs, rtol=1e-6, atol=1e-5 * moved)


def _start() -> Tensor:
    """The weights before the first step. The pieces differ in size, which is what norms of them would show."""
    weight = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    weight[: SIZE // 2] *= 0.1
    return weight


def _gradient(step: int, weight: Tensor) -> Tensor:
    """The gradient of a step at flat weights, and flat: one of `KINDS` in turn, each row of a size of its own."""
    random = torch.randn(SHAPES[0], generator=torch.Generator().manual_seed(1 + step))
    rows = 1 + 9 * (torch.arange(SHAPES[0][0]) % 2)[:, None]
    return (KINDS[step % len(KINDS)](random, weight.reshape(SHAPES[0])) * rows).flatten()


def _nearly_orthogonal(random: Tensor, weight: Tensor) -> Tensor:
    """Each row nearly orthogonal to that of the weights: AdamP and SGDP then take out what is left."""
    direction = nn.functional.normalize(weight, dim=1)
    return random + (0.05 - (random * direction).sum(1, keepdim=True)) * direction


KINDS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda random, weight: random,
    _nearly_orthogonal,
    lambda random, weight: random * (random > 1.5),  # sparse
    lambda random, weight: torch.ones_like(random),
    lambda random, weight: weight,
    lambda random, weight: random * (torch.arange(len(random)) < len(random) // 2)[:, None],  # of one piece
)
"""Gradients of the shape of a matrix, of random numbers and the weights."""


class _Trial:
    """An optimizer of `_start`, which is cut into tensors of `shapes`. What it raises becomes a ConfigError."""

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        settings: Mapping[str, Any],
        shapes: Sequence[Sequence[int]],
    ) -> None:
        self._kind = kind
        pieces = zip(_start().split([math.prod(shape) for shape in shapes]), shapes, strict=True)
        self._params = [nn.Parameter(piece.reshape(shape).clone()) for piece, shape in pieces]
        try:
            self.optimizer = kind(self._params, **settings)
        except Exception as error:  # optimizers raise errors of all kinds
            raise self._refusal(error) from None

    def weights(self) -> Tensor:
        """As they are now, flat."""
        return torch.cat([param.detach().flatten() for param in self._params])

    def step(self, gradient: Tensor) -> Tensor:
        """The weights after one more step. gradient: flat."""
        sizes = [param.numel() for param in self._params]
        for param, piece in zip(self._params, gradient.split(sizes), strict=True):
            param.grad = piece.reshape(param.shape).clone()
        try:
            self.optimizer.step()
        except Exception as error:  # optimizers raise errors of all kinds
            raise self._refusal(error) from None
        return self.weights()

    def _refusal(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"optimizer {self._kind.__name__} does not update tensors by their gradients alone: {reason_of(error)}"
        )


def _state_of(
    optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer], settings: Mapping[str, Any]
) -> OptimizerState:
    group = optimizer.param_groups[0]
    (param,) = group["params"]
    fresh = kind([torch.zeros(1, requires_grad=True)], **settings).param_groups[0]
    for name in group.keys() - {"params"}:
        if group[name] != fresh.get(name):
            raise ConfigError(
                f"optimizer {kind.__name__} keeps {name!r} beside the settings of its groups, where a resumed run "
                "would not find it; use one that keeps all in its state, such as AdamW or SGD"
            )
    moments, counts = [], {}
    for name, value in optimizer.state[param].items():
        if isinstance(value, Tensor) and value.shape == param.shape and value.dtype == torch.float32:
            moments.append(name)
        elif not isinstance(value, Tensor) or value.dim() == 0:
            counts[name] = value
        else:
            raise ConfigError(
                f"optimizer {kind.__name__} keeps {name} {tuple(value.shape)} of type {value.dtype} for a tensor "
                f"of {tuple(param.shape)}; a run could not be resumed, since only states in fp32 of each element "
                "can be cut anew"
            )
    return OptimizerState(
        tuple(moments), {name: value for name, value in counts.items() if value is not None}
    )
