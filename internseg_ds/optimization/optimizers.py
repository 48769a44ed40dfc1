"""The optimizer that the config names, over parameter groups: torch's own, or DeepSpeed's CPU Adam where its
state is offloaded."""

import difflib
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
from internseg_ds.optimization.ranged_adam import RangedAdam

PACKAGES = {
    "8bit": "bitsandbytes",
    "lion": "lion-pytorch",
    "lamb": "timm",
    "adan": "timm",
    "lars": "timm",
    "prodigy": "prodigyopt",
    "dadapt": "dadaptation",
    "schedulefree": "schedulefree",
}
"""Packages of optimizers that neither torch nor mmcv have, by a part of the optimizers' names in lower
case."""


def check_optimizer(section: Mapping[str, Any], ds: DsConfig) -> str:
    """The optimizer's type.

    section: the config's `optimizer`. Raises ConfigError when mmcv knows no such type, when it does not take
    these settings, or when an offloaded optimizer is not Adam or AdamW.
    """
    kind = section.get("type", "AdamW")
    if OPTIMIZERS.get(kind) is None:
        raise ConfigError(f"optimizer.type={kind!r} is not registered in mmcv; {_where_it_may_be(str(kind))}")
    if ds.cpu_adam and kind not in ("Adam", "AdamW"):
        raise ConfigError(
            f"{ds.source} offloads the optimizer, which runs DeepSpeed's CPU Adam, but optimizer.type is "
            f"{kind!r}; use AdamW, or drop offload_optimizer"
        )
    parameters = inspect.signature(OPTIMIZERS.get(kind)).parameters
    if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in _settings(section):
            if key not in parameters:
                raise unknown_key(key, parameters.keys() - {"params"}, f"optimizer {kind}")
    try:
        OPTIMIZERS.get(kind)([torch.zeros(1, requires_grad=True)], **_settings(section))
        if ds.cpu_adam:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            # its arguments alone: making one would compile its extension
            inspect.signature(DeepSpeedCPUAdam).bind([], adamw_mode=True, **_settings(section))
    except Exception as error:  # constructors raise errors of all kinds
        raise ConfigError(f"optimizer {kind} does not take these settings: {reason_of(error)}") from None
    return kind


def _where_it_may_be(kind: str) -> str:
    """How to get an optimizer that is not registered."""
    package = next((package for word, package in PACKAGES.items() if word in kind.lower()), None)
    if package is not None:
        return (
            f"it is a class of the package {package}: pip install {package}, and register it in a module "
            f"that custom_imports names, OPTIMIZERS.register_module(module={kind}) with mmcv.runner's "
            "OPTIMIZERS"
        )
    near = difflib.get_close_matches(kind, OPTIMIZERS.module_dict, n=1)
    return f"did you mean {near[0]!r}?" if near else "AdamW is the usual one"


def _settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the optimizer's class."""
    return {
        key: value for key, value in section.items() if key not in ("type", "constructor", "paramwise_cfg")
    }


def is_ranged(section: Mapping[str, Any], ds: DsConfig) -> bool:
    """Whether one parameter group of DeepSpeed's holds several settings (`RangedAdam`): with torch's Adam and
    AdamW, on the device. An update on the host is limited by the host's memory, not by the number of
    calls."""
    kinds = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
    kind = section.get("type", "AdamW")
    return (
        not ds.cpu_adam
        and not section.get("amsgrad")
        and kind in kinds
        and OPTIMIZERS.get(kind) is kinds[kind]
    )


def group_limit(ds: DsConfig) -> float:
    """Elements that one parameter group of several settings may have. ZeRO-1 and 2 make the fp32 gradients of
    a group all at once; ZeRO-3 divides groups itself."""
    return math.inf if ds.stage == 3 else SUB_GROUP * ds.world_size


def build_optimizer(
    groups: list[dict[str, Any]], section: Mapping[str, Any], ds: DsConfig
) -> torch.optim.Optimizer:
    """The optimizer for `deepspeed.initialize`. Adam and AdamW run torch's fused kernels, on GPUs and CPUs.

    groups: as `parameter_groups` makes them. section: the config's `optimizer` (type, lr, betas,
    weight_decay, ...). Raises ConfigError where `check_optimizer` does.
    """
    settings = _settings(section)
    kind = check_optimizer(section, ds)
    if ds.cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        build_extension("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, adamw_mode=kind == "AdamW", **settings)
    if kind in ("Adam", "AdamW") and not settings.get("foreach"):
        settings.setdefault("fused", True)
    if is_ranged(section, ds):
        return RangedAdam(groups, OPTIMIZERS.get(kind), group_limit(ds), **settings)
    optimizer = OPTIMIZERS.get(kind)(groups, **settings)
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
