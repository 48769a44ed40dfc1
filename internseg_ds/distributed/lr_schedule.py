"""Learning rate over steps, per parameter group, as mmcv's `lr_config` describes it: any of mmcv's policies, with its warmup.

The formulas are mmcv's own (1.7, `runner/hooks/lr_updater.py`), asked one step at a time; nothing of its runner is there.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from mmcv.runner import HOOKS
from mmcv.runner.hooks.lr_updater import LrUpdaterHook
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SUFFIX = "LrUpdaterHook"


def policies() -> dict[str, type[LrUpdaterHook]]:
    """mmcv's policies whose rate follows from the step and the group's base rate alone, by the names that `lr_config.policy` has for them."""
    hooks = {
        name.removesuffix(SUFFIX): kind
        for name, kind in HOOKS.module_dict.items()
        if name.endswith(SUFFIX) and name != SUFFIX
    }
    # the restarting one has no rate after its last period, which torch's scheduler asks for
    return {
        name: kind
        for name, kind in hooks.items()
        if kind.before_run is LrUpdaterHook.before_run and name != "CosineRestart"
    }


def policy_name(policy: str) -> str:
    """The name in `policies` that a config means: mmcv also takes all lower case."""
    return policy.title() if policy == policy.lower() else policy


def arguments(policy: str) -> set[str]:
    """What mmcv's hook of a policy takes."""
    kind = policies()[policy_name(policy)]
    return {
        name
        for base in kind.__mro__
        if issubclass(base, LrUpdaterHook)
        for name in inspect.signature(base.__init__).parameters
    } - {"self", "kwargs"}


@dataclass(frozen=True)
class LrSchedule:
    """lr(step) of a group with base learning rate `base`: mmcv's hook `policy` with `settings` (power, min_lr, warmup, warmup_iters, step, ...).

    step counts optimizer updates from 0; learning rates are absolute. With the policy "poly" and linear warmup:

    poly(step)   = (base - min_lr) * (1 - step / max_steps) ** power + min_lr
    lr(step)     = poly(step) * (1 - (1 - step / warmup_iters) * (1 - warmup_ratio))   while step < warmup_iters
                 = poly(step)                                                          afterwards
    """

    max_steps: int
    policy: str = "poly"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _hook(self) -> LrUpdaterHook:
        return policies()[policy_name(self.policy)](**{**self.settings, "by_epoch": False})

    def check(self) -> None:
        """Asks for the first rate and the last. Raises whatever mmcv's hook does, for settings that it does not take."""
        self.lr(0, 1.0), self.lr(self.max_steps, 1.0)

    def lr(self, step: int, base: float) -> float:
        """The learning rate that update number `step` (from 0) of a group with rate `base` uses; after the last step it stays."""
        hook = self._hook
        try:
            rate = hook.get_lr(
                SimpleNamespace(iter=min(step, self.max_steps), max_iters=self.max_steps), base
            )
        except (
            ZeroDivisionError
        ):  # after the last step, where mmcv never asks, of FlatCosineAnnealing that has no step to anneal in
            if step < self.max_steps:
                raise
            rate = hook.get_lr(SimpleNamespace(iter=self.max_steps - 1, max_iters=self.max_steps), base)
        if hook.warmup is not None and step < hook.warmup_iters:
            hook.regular_lr = [rate]
            (rate,) = hook.get_warmup_lr(step)
        return rate

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule as torch's scheduler over `optimizer`'s groups; each group keeps its own base rate (`initial_lr` after a resume)."""
        bases = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        return LambdaLR(
            optimizer, [lambda step, base=base: self.lr(step, base) / base if base else 0.0 for base in bases]
        )
