"""The optimizer that the config names, over parameter groups: torch's own, or DeepSpeed's CPU Adam where its
state is offloaded."""

import difflib
import importlib
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmcv.runner.optimizer import OPTIMIZERS

from internseg_ds.config.ds_config import SUB_GROUP, DsConfig
from internseg_ds.distributed.extensions import build_extension
from internseg_ds.errors import ConfigError, reason_of, unknown_key
from internseg_ds.optimization.compact_adam import CompactAdam
from internseg_ds.optimization.muon import MOMENTUM, Muon
from internseg_ds.optimization.optimizer_state import OptimizerState, optimizer_state
from internseg_ds.optimization.ranged_adam import MOMENTS, RangedAdam

ADAMS = (torch.optim.Adam, torch.optim.AdamW)
"""Those with kernels of DeepSpeed's on the host, and fused ones of torch's."""


def optimizer_class(kind: Any) -> type[Any]:
    """The class of optimizer.type: of mmcv's registry, in which all of torch's are; of timm (Lion); or, by its
    whole path, of any package ("package.module.Class"). Muon is ours, since torch's needs whole matrices. Raises
    ConfigError where there is none."""
    if kind == "Muon":
        return Muon
    module, _, name = str(kind).rpartition(".")
    if not module and (registered := OPTIMIZERS.get(name)) is not None:
        return registered
    try:
        found = getattr(importlib.import_module(module or "timm.optim"), name, None)
    except (ImportError, TypeError, ValueError) as error:  # the last two of names that are no paths
        raise ConfigError(f"optimizer.type={kind!r} cannot be imported: {reason_of(error)}") from None
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    known = {each.lower(): each for each in OPTIMIZERS.module_dict}
    near = [known[each] for each in difflib.get_close_matches(str(kind).lower(), known, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else "AdamW is the usual one"
    raise ConfigError(
        f"optimizer.type={kind!r} is no optimizer of torch, mmcv or timm; {hint} (one of another package is "
        "named by its path, 'package.module.Class')"
    )


def class_of(section: Mapping[str, Any]) -> type[Any]:
    """The class of the config's `optimizer`. Raises ConfigError as `optimizer_class` does."""
    return optimizer_class(section.get("type", "AdamW"))


def check_optimizer(section: Mapping[str, Any], ds: DsConfig) -> type[Any]:
    """The optimizer's class.

    section: the config's `optimizer`. Raises ConfigError when there is no such type, when it does not take
    these settings or cannot work on ZeRO's pieces of tensors, or when an offloaded optimizer is not Adam or AdamW.
    """
    of_kind = class_of(section)
    if of_kind is Muon:
        _check_zero_for_muon(ds)
    if ds.cpu_adam and of_kind not in ADAMS:
        raise ConfigError(
            f"{ds.source} offloads the optimizer, which runs DeepSpeed's CPU Adam, but optimizer.type is "
            f"{section['type']!r}; use AdamW, or drop offload_optimizer"
        )
    if ds.optimizer_states != "fp32" and (of_kind is Muon or not is_ranged(section, ds)):
        amsgrad = " with amsgrad" if section.get("amsgrad") else ""
        raise ConfigError(
            f"engine.optimizer_states={ds.optimizer_states!r} is for optimizer.type 'Adam' or 'AdamW' "
            f"without amsgrad, and this one is {of_kind.__name__!r}{amsgrad}; use AdamW, or leave "
            'engine.optimizer_states at "fp32"'
        )
    _check_settings(of_kind, _settings(section), ds)
    if issubclass(of_kind, torch.optim.Adagrad):
        raise ConfigError(
            "optimizer Adagrad cannot be: DeepSpeed puts one of a single group in its place, which follows no "
            "schedule; use RMSprop or AdamW"
        )
    kept_state(section)
    return of_kind


def _check_settings(of_kind: type[Any], settings: Mapping[str, Any], ds: DsConfig) -> None:
    """Raises ConfigError for settings that the class does not know, or whose values it does not take."""
    parameters = inspect.signature(of_kind).parameters.values()
    # what has no name outside is no setting
    known = {each.name: each for each in parameters if each.kind != inspect.Parameter.POSITIONAL_ONLY}
    known.pop("params", None)
    takes_any = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters)
    for key, value in settings.items():
        if key not in known and not takes_any:
            raise unknown_key(key, known, f"optimizer {of_kind.__name__}")
        if key in known and isinstance(known[key].default, bool) and not isinstance(value, bool):
            raise ConfigError(f"optimizer.{key}={value!r} must be True or False")
    error = _objection_to(settings, of_kind, ds)
    alone = {"lr": 0.1}
    if error is None or _objection_to(alone, of_kind, ds) is not None:
        return  # one that updates nothing, whatever its settings, `kept_state` refuses
    at_fault = [
        f"optimizer.{key}={value!r}"
        for key, value in settings.items()
        if _objection_to({**alone, key: value}, of_kind, ds) is not None
    ]
    what = ", ".join(at_fault) or f"these settings together: {', '.join(settings)}"
    raise ConfigError(f"optimizer {of_kind.__name__} does not take {what}: {reason_of(error)}")


def _objection_to(settings: Mapping[str, Any], of_kind: type[Any], ds: DsConfig) -> Exception | None:
    """What an optimizer with these settings raises when it is made, or in its first steps; None where it makes
    them."""
    param = torch.ones(2, 2, requires_grad=True)
    try:
        if ds.cpu_adam:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            # its arguments alone: making one would compile its extension
            inspect.signature(DeepSpeedCPUAdam).bind([], adamw_mode=True, **settings)
        optimizer = of_kind([param], **settings)
        for _ in range(0 if of_kind is Muon else 2):  # which steps DeepSpeed's flat tensors only
            param.grad = torch.ones_like(param)
            optimizer.step()
        if not bool(param.isfinite().all()):
            raise ValueError("what it makes of finite gradients is not finite")
    except Exception as error:  # optimizers raise errors of all kinds
        return error
    return None


def kept_state(section: Mapping[str, Any]) -> OptimizerState:
    """What the optimizer of a config keeps of its parameters. Raises ConfigError for one that does not work on
    flat pieces of tensors."""
    of_kind = class_of(section)
    if of_kind is Muon:
        return OptimizerState((*MOMENTS, MOMENTUM), {"step": torch.zeros(())})
    return optimizer_state(of_kind, _settings(section))


def _check_zero_for_muon(ds: DsConfig) -> None:
    """Raises ConfigError where the optimizer's tensors lie on the host."""
    zero = ds.raw["zero_optimization"]
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise ConfigError(
            f"{ds.source} offloads the optimizer, but Muon puts matrices together on the accelerator; drop "
            "offload_optimizer, or use AdamW"
        )


def _settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the optimizer's class."""
    return {
        key: value for key, value in section.items() if key not in ("type", "constructor", "paramwise_cfg")
    }


def is_ranged(section: Mapping[str, Any], ds: DsConfig) -> bool:
    """Whether one parameter group of DeepSpeed's holds several settings (`RangedAdam`): with Muon, and with
    torch's Adam and AdamW on the device. An update on the host is limited by the host's memory, not by the number of
    calls."""
    of_kind = class_of(section)
    return of_kind is Muon or (of_kind in ADAMS and not ds.cpu_adam and not section.get("amsgrad"))


def group_limit(ds: DsConfig) -> float:
    """Elements that one parameter group of several settings may have. ZeRO-1 and 2 make the fp32 gradients of
    a group all at once; ZeRO-3 divides groups itself."""
    return math.inf if ds.stage == 3 else SUB_GROUP * ds.world_size


def build_optimizer(
    groups: list[dict[str, Any]], section: Mapping[str, Any], ds: DsConfig, *, compiled: bool = False
) -> torch.optim.Optimizer:
    """The optimizer for `deepspeed.initialize`. Adam and AdamW run torch's fused kernels, on GPUs and CPUs.

    groups: as `parameter_groups` makes them. section: the config's `optimizer` (type, lr, betas,
    weight_decay, ...). ds: says in what its moments are held. compiled: whether those that are not fp32 are
    converted by compiled functions. Raises ConfigError where `check_optimizer` does.
    """
    settings = _settings(section)
    of_kind = check_optimizer(section, ds)
    if of_kind is Muon:
        return Muon(groups, group_limit(ds), **settings)
    if ds.cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        build_extension("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, adamw_mode=of_kind is torch.optim.AdamW, **settings)
    if of_kind in ADAMS and not settings.get("foreach"):
        settings.setdefault("fused", True)
    if ds.optimizer_states != "fp32":
        return CompactAdam(
            groups, of_kind, group_limit(ds), ds.optimizer_states, compiled=compiled, **settings
        )
    if is_ranged(section, ds):
        return RangedAdam(groups, of_kind, group_limit(ds), **settings)
    optimizer = of_kind(groups, **settings)
    # on the object, not by a subclass: DeepSpeed recognises its optimizers by their exact class
    optimizer.step = types.MethodType(_step_of_groups_with_parameters, optimizer)
    return optimizer


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose groups have the learning rates that the schedule changes."""
    return optimizer.settings if isinstance(optimizer, RangedAdam) else optimizer


def _step_of_groups_with_parameters(
    self: torch.optim.Optimizer, closure: Callable[[], float] | None = None
) -> float | None:
    """An optimizer's `step` that skips groups without parameters.

    ZeRO-3 updates one group at a time: it empties all others, and calls `step` once for each. torch looks
    into every group each time, which for the 98 groups of a layer-wise learning rate is 9,604 looks and some
    30 ms of Python in each training step (docs/performance.md).
    """
    groups = self.param_groups
    self.param_groups = [group for group in groups if group["params"]]
    try:
        return type(self).step(self, closure)
    finally:
        self.param_groups = groups
