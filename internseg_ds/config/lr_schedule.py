"""Learning rate over steps, per parameter group, as mmcv's `lr_config` describes it: any of mmcv's policies,
with its warmup.

The formulas are mmcv's own (1.7, `runner/hooks/lr_updater.py`), asked one step at a time; nothing of its
runner is there.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from mmcv import Config
from mmcv.runner import HOOKS
from mmcv.runner.hooks.lr_updater import LrUpdaterHook
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from internseg_ds.config.engine_options import whole_number
from internseg_ds.errors import ConfigError, counted, reason_of, unknown_key

SUFFIX = "LrUpdaterHook"
NOT_NEGATIVE = ("power", "min_lr", "min_lr_ratio", "warmup_ratio", "warmup_iters", "gamma")
"""Settings of mmcv's hooks that are numbers of at least 0."""


def policies() -> dict[str, type[LrUpdaterHook]]:
    """mmcv's policies whose rate follows from the step and the group's base rate alone, by the names that
    `lr_config.policy` has for them."""
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
    constructors = [vars(base).get("__init__") for base in kind.__mro__ if issubclass(base, LrUpdaterHook)]
    return {
        name
        for constructor in constructors
        if constructor is not None
        for name in inspect.signature(constructor).parameters
    } - {"self", "kwargs"}


@dataclass(frozen=True)
class LrSchedule:
    """lr(step) of a group with base learning rate `base`: mmcv's hook `policy` with `settings` (power,
    min_lr, warmup, warmup_iters, step, ...).

    step counts optimizer updates from 0; learning rates are absolute. With the policy "poly" and linear
    warmup:

    poly(step)   = (base - min_lr) * (1 - step / max_steps) ** power + min_lr
    lr(step)     = poly(step) * (1 - (1 - step / warmup_iters) * (1 - warmup_ratio))  if step < warmup_iters
                 = poly(step)                                                          afterwards
    """

    max_steps: int
    policy: str = "poly"
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps_per_epoch: int | None = None
    """Of a run whose length its config gives in epochs; with settings["by_epoch"], mmcv's default, its rate
    then changes between epochs only (but for the warmup)."""

    @cached_property
    def _hook(self) -> LrUpdaterHook:
        by_epoch = self.steps_per_epoch is not None and self.settings.get("by_epoch", True)
        return policies()[policy_name(self.policy)](
            **{**self.settings, "by_epoch": by_epoch, "warmup_by_epoch": False}
        )

    def with_epochs_of(self, steps: int) -> "LrSchedule":
        """A schedule that was read with epochs of one step, with epochs of so many."""
        settings = dict(self.settings)
        if settings.pop("warmup_by_epoch", False) and settings.get("warmup_iters"):
            settings["warmup_iters"] *= steps
        return replace(self, max_steps=self.max_steps * steps, settings=settings, steps_per_epoch=steps)

    def warmup_warning(self, path: str) -> Iterator[str]:
        """A warning where the warmup never ends."""
        warmup = self.settings.get("warmup_iters") or 0
        if warmup >= self.max_steps:
            yield (
                f"lr_config.warmup_iters={warmup} of {path} is not shorter than all of the training "
                f"({counted(self.max_steps, 'step')}), which never gets to its learning rate"
            )

    def check(self) -> None:
        """Asks for the first rate and the last. Raises whatever mmcv's hook does, for settings that it does
        not take, and ValueError for rates that are no numbers."""
        for step in (0, self.max_steps):
            rate = self.lr(step, base=1.0)
            if not math.isfinite(rate):
                raise ValueError(f"the learning rate of step {step} would be {rate} times the optimizer's")

    def lr(self, step: int, base: float) -> float:
        """The learning rate that update number `step` (from 0) of a group with rate `base` uses; after the
        last step it stays."""
        hook = self._hook
        try:
            rate = hook.get_lr(self._runner_at(min(step, self.max_steps)), base)
        except ZeroDivisionError:
            # after the last step, where mmcv never asks: FlatCosineAnnealing may have no step to anneal in
            if step < self.max_steps:
                raise
            rate = hook.get_lr(self._runner_at(self.max_steps - 1), base)
        if hook.warmup is not None and step < hook.warmup_iters:
            hook.regular_lr = [rate]
            (rate,) = hook.get_warmup_lr(step)
        return rate

    def _runner_at(self, step: int) -> SimpleNamespace:
        """What mmcv's hooks ask of a runner."""
        length = self.steps_per_epoch or 1
        return SimpleNamespace(
            iter=step,
            max_iters=self.max_steps,
            epoch=step // length,
            max_epochs=self.max_steps // length,
        )

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule as torch's scheduler over `optimizer`'s groups; each group keeps its own base rate
        (`initial_lr` after a resume)."""
        bases = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        return LambdaLR(optimizer, [self._factor(base) for base in bases])

    def _factor(self, base: float) -> Callable[[int], float]:
        """lr(step) / base, which torch multiplies base with."""
        return lambda step: self.lr(step, base) / base if base else 0.0


def read_schedule(cfg: Config, path: str) -> LrSchedule:
    """The sections `runner` and `lr_config` of a config; path: for messages.

    Where the runner counts epochs, each of them has one step, until `with_epochs_of` gives the true number.
    Raises ConfigError for a runner that counts steps with a policy that counts epochs, and for settings that
    the policy does not take.
    """
    in_epochs = counts_epochs(cfg)
    steps = _max_steps(cfg.runner, path, "max_epochs" if in_epochs else "max_iters")
    section: Mapping[str, Any] = cfg.lr_config
    policy = section.get("policy", "poly")
    if not isinstance(policy, str) or policy_name(policy) not in policies():
        raise ConfigError(
            f"lr_config.policy={policy!r} of {path} is not known here; the policies are "
            f"{', '.join(policies())}"
        )
    settings = {key: value for key, value in section.items() if key != "policy"}
    counts = policy_name(policy) != "Fixed"  # which has the same rate whatever is counted
    if not in_epochs and ((counts and settings.get("by_epoch", True)) or settings.get("warmup_by_epoch")):
        raise ConfigError(
            f"lr_config of {path} must have by_epoch=False (mmcv's default is True): its runner counts steps, "
            "not epochs"
        )
    _check_settings(settings, policy, path)
    if not settings.get("warmup_iters", 0):  # mmcv wants at least one step of a warmup
        settings.pop("warmup", None)
    schedule = LrSchedule(steps, policy, settings, steps_per_epoch=1 if in_epochs else None)
    try:
        schedule.check()
    except Exception as error:  # whatever mmcv's hook refuses with
        raise ConfigError(f"lr_config = {dict(section)} of {path} cannot work: {reason_of(error)}") from error
    return schedule


def counts_epochs(cfg: Mapping[str, Any]) -> bool:
    """Whether a config gives the length of its run in epochs."""
    return cfg["runner"].get("type") == "EpochBasedRunner"


def _max_steps(runner: Mapping[str, Any], path: str, key: str) -> int:
    if runner.get("max_iters") is not None and runner.get("max_epochs") is not None:
        raise ConfigError(
            f"runner of {path} has max_iters={runner['max_iters']!r} and max_epochs={runner['max_epochs']!r}, and "
            "a run has one length; leave out one of them (over a _base_: runner=dict(_delete_=True, ...))"
        )
    kind = runner.get("type", "IterBasedRunner")
    if kind not in ("IterBasedRunner", "EpochBasedRunner") or key not in runner:
        raise ConfigError(
            f"runner = {dict(runner)} of {path} does not say how long a run is; write "
            "runner = dict(type='IterBasedRunner', max_iters=...), or "
            "dict(type='EpochBasedRunner', max_epochs=...)"
        )
    return whole_number(runner[key], f"runner.{key} of {path}", least=1)


def _check_settings(settings: Mapping[str, Any], policy: str, path: str) -> None:
    known = arguments(policy)
    for key, value in settings.items():
        if key not in known:
            raise unknown_key(key, known, f"lr_config with policy {policy!r} of {path}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in NOT_NEGATIVE and value is not None and not (is_number and 0 <= value < math.inf):
            raise ConfigError(f"lr_config.{key}={value!r} of {path} must be a number of at least 0")
        if key == "warmup_iters" and value is not None:
            whole_number(value, f"lr_config.{key} of {path}", least=0)


def schedule_warnings(
    lr_config: Mapping[str, Any], lr: Any, schedule: LrSchedule, path: str
) -> Iterator[str]:
    """What is odd about the `schedule` that `lr_config` describes. lr: the optimizer's."""
    warmup = lr_config.get("warmup_iters") or 0
    if warmup and lr_config.get("warmup") is None:
        yield (
            f"lr_config.warmup_iters={warmup} of {path} warms nothing up without warmup='linear' "
            "(or 'constant', 'exp')"
        )
    elif schedule.steps_per_epoch is None:
        yield from schedule.warmup_warning(path)
    least = lr_config.get("min_lr")
    if lr == 0 and not least:
        yield f"optimizer.lr={lr!r} of {path}, so no weight changes"
    if isinstance(least, (int, float)) and isinstance(lr, (int, float)) and least > lr:
        yield f"lr_config.min_lr={least:g} of {path} is above optimizer.lr={lr:g}, so the learning rate grows"
