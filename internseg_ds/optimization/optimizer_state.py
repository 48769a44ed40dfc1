"""What an optimizer keeps of its parameters, found by letting it update small tensors.

ZeRO updates flat pieces of parameters, and a resume cuts these pieces anew. So an optimizer works here if each
element of its update depends on that element alone, and if its state is made of such elements and of counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internseg_ds.errors import ConfigError, reason_of

SHAPE = (128, 80)
"""Of the tensors that it is tried with. Half of one has more elements than any library treats as a small tensor:
bitsandbytes keeps the state of fewer than 4,096 in fp32."""
STEPS = 2


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
    weight, gradients = _tensors()
    whole, whole_optimizer = _updated([weight], [[gradient] for gradient in gradients], kind, settings)
    try:
        pieces, _ = _updated(
            list(weight.flatten().split(weight.numel() // 2)),
            [list(gradient.flatten().split(gradient.numel() // 2)) for gradient in gradients],
            kind,
            settings,
        )
        same = torch.allclose(torch.cat(pieces), whole[0].flatten(), rtol=1e-4, atol=1e-7)
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(
            f"optimizer {kind.__name__} looks at tensors as a whole (their norm, their rows and columns), and "
            "ZeRO gives it flat pieces of them; use one that updates each element by itself, such as AdamW or SGD"
        )
    state = _state_of(whole_optimizer, kind, settings)
    slower = {**settings, "lr": 0.5 * whole_optimizer.defaults.get("lr", 1.0)}
    _, other = _updated([weight], [[gradient] for gradient in gradients], kind, slower)
    others = _state_of(other, kind, slower).counts
    for name, value in state.counts.items():
        if value != others[name]:
            raise ConfigError(
                f"optimizer {kind.__name__} keeps {name!r}, which follows the learning rate of each group; a "
                "resumed run would have that of one group in all; use AdamW or SGD"
            )
    return state


def _tensors() -> tuple[Tensor, list[Tensor]]:
    """A weight, and its gradient at each step: `SHAPE`, float32."""
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = (torch.randn(SHAPE, generator=generator) for _ in range(1 + STEPS))
    # the pieces differ in size, which is what norms of pieces would show
    weight[: SHAPE[0] // 2] *= 10
    return weight, [gradient * (1 + 9 * (torch.arange(SHAPE[0]) % 2))[:, None] for gradient in gradients]


def _updated(
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    kind: type[torch.optim.Optimizer],
    settings: Mapping[str, Any],
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """The weights after a step for each of `gradients`, and the optimizer."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    try:
        optimizer = kind(params, **settings)
        for of_step in gradients:
            for param, gradient in zip(params, of_step, strict=True):
                param.grad = gradient.clone()
            optimizer.step()
    except Exception as error:  # optimizers raise errors of all kinds
        raise ConfigError(
            f"optimizer {kind.__name__} does not update tensors by their gradients alone: {reason_of(error)}"
        ) from None
    return [param.detach() for param in params], optimizer


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
