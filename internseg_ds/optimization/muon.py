"""Muon for the matrices of a backbone's blocks and AdamW for all else, over the flat tensors of ZeRO-1, 2 and 3.

m <- beta m + (1 - beta) g
W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) NS((1 - beta) g + beta m)

NS is a Newton-Schulz iteration, which brings the singular values of a matrix to about 1. Source: K. Jordan et al.,
"Muon: An optimizer for hidden layers in neural networks" (2024), with Nesterov's momentum; torch.optim.Muon and
DeepSpeed's runtime/zero/muon compute the same.

NS is DeepSpeed's own; the optimizer around it is not. DeepSpeed 0.19.8 orthogonalises gradients before it takes
their norm (stage3.py and stage_1_and_2.py, `step`), so that gradient clipping scales updates down whatever the
gradients are; it keeps the momentum in the dtype of communication under ZeRO-3 (stage3.py,
`_create_momentum_buffer`) and of gradients under ZeRO-2; and under ZeRO-1 and 2 each rank keeps that of whole
matrices (stage_1_and_2.py, `_muon_momentum_buffer`), which another number of processes could not go on from. Here
gradients are reduced, clipped and skipped as those of any optimizer, and the momentum is fp32 and cut like the
master weights.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internseg_ds.distributed.zero_internals import NEWTON_SCHULZ, orthogonalized
from internseg_ds.optimization.matrix_exchange import MatrixExchange, exchanges
from internseg_ds.optimization.ranged_adam import RangedAdam
from internseg_ds.torch_internals import adam_step_count

MOMENTUM = "momentum_buffer"
"""The name of Muon's moment in the state, as torch and DeepSpeed have it."""


class Muon(RangedAdam):
    """The optimizer that DeepSpeed is given: groups of matrices, and groups of all else, which are
    `RangedAdam`'s.

    The state of a flat tensor of matrices is `momentum_buffer`, fp32 and of its size, and the count `step`.
    """

    def __init__(
        self,
        params: Sequence[Any],
        limit: float = math.inf,
        /,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ns_method: str = "gram",
    ) -> None:
        """params: groups with params, lr, weight_decay and use_muon, as `parameter_groups` makes them; or
        parameters, which are Adam's. limit: as of `bundles`. lr: of matrices. adam_lr: of all else, None: the same.
        momentum: beta above. betas, eps: Adam's. ns_method: which iteration, by DeepSpeed's name: "gram" or
        "standard".

        Defaults are those of DeepSpeed's Muon and of torch's Adam. Raises ValueError for values that cannot be
        meant."""
        if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r} must be at least 0 and below 1")
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas={betas!r} must be two numbers")
        if ns_method not in NEWTON_SCHULZ:
            raise ValueError(f"ns_method={ns_method!r} must be {' or '.join(map(repr, NEWTON_SCHULZ))}")
        self.momentum, self.ns_method = momentum, ns_method
        self._exchanges: dict[Tensor, MatrixExchange] = {}
        super().__init__(
            [group if isinstance(group, Mapping) else {"params": [group]} for group in params],
            torch.optim.AdamW,
            limit,
            lr=lr if adam_lr is None else adam_lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            fused=True,
        )

    def find_matrices(self, engine: Any, groups: Sequence[Mapping[str, Any]]) -> None:
        """Finds where in the flat tensors the matrices lie. Collective; once, after DeepSpeed has made the
        tensors.

        engine: DeepSpeed's, initialised with this optimizer. groups: those that it was made with.
        """
        matrices = [param for group in groups if group["use_muon"] for param in group["params"]]
        self.place(exchanges(engine, matrices))

    def place(self, found: Mapping[Tensor, MatrixExchange]) -> None:
        """Sets which flat tensors are of matrices, and how those are put together."""
        self._exchanges = dict(found)

    def _update(self, flat: Tensor, gradient: Tensor) -> None:
        """Collective where a matrix is divided among ranks. gradient: of matrices, is their update
        afterwards."""
        if flat not in self._exchanges:
            super()._update(flat, gradient)
            return
        state = self.state[flat]
        if MOMENTUM not in state:
            state |= {"step": adam_step_count(self, 0, flat.device), MOMENTUM: torch.zeros_like(flat)}
        state["step"] += 1
        state[MOMENTUM].lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp_(state[MOMENTUM], self.momentum)
        self._exchanges[flat].replace(update, partial(_direction, ns_method=self.ns_method))
        for start, stop, number in self._ranges[flat]:
            setting = self.settings.param_groups[number]
            flat[start:stop].mul_(1 - setting["lr"] * setting["weight_decay"])
            flat[start:stop].add_(update[start:stop], alpha=-setting["lr"])


def _direction(matrix: Tensor, ns_method: str) -> Tensor:
    """The orthogonalised matrix, scaled so that a tall one changes its outputs as much as a wide one."""
    rows, columns = matrix.shape
    return orthogonalized(matrix, ns_method) * math.sqrt(max(1.0, rows / columns))
