"""Parameter groups: the learning rate and weight decay of each parameter, as mmcv's optimizer constructors
define them.

In: a model (whole, or partitioned by ZeRO-3) and the config's `optimizer` section. Out: groups for a torch
optimizer, one for each distinct setting.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmseg.core.builder import build_optimizer_constructor  # builds mmcv's constructors too
from torch import nn

import internseg_ds.optimization.layer_decay  # noqa: F401 - registers its constructor
from internseg_ds.errors import ConfigError, UserError, reason_of, shortened, unknown_key
from internseg_ds.optimization.block_matrices import block_matrices
from internseg_ds.optimization.muon import Muon
from internseg_ds.optimization.optimizers import class_of

PARAMWISE = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
)
"""What mmcv's DefaultOptimizerConstructor reads of `paramwise_cfg` (mmcv 1.7,
`runner/optimizer/default_constructor.py`)."""
CUSTOM = ("lr_mult", "decay_mult")
"""What it reads of each of the `custom_keys`."""

Group = dict[str, Any]
"""A parameter group: params, lr, weight_decay, name; with Muon use_muon, whether these are matrices that it
updates."""


def parameter_groups(model: nn.Module, optimizer: Mapping[str, Any]) -> list[Group]:
    """Groups of the trainable parameters, merged where lr, weight decay and name are the same, in the order
    in which they first appear. Each has params, lr, weight_decay, name; with Muon use_muon, too: the groups of
    the constructor are divided into matrices (`block_matrices`) and all else, whose learning rate is
    adam_lr / lr of the group's.

    optimizer: the config's section; `constructor` chooses the rule (default: mmcv's
    DefaultOptimizerConstructor), `paramwise_cfg` are its settings. Raises ConfigError when lr is missing,
    when a constructor gives groups other settings of their own, when nothing is left to train, or no matrix
    that Muon would update.
    """
    settings = _optimizer_settings(optimizer)
    singles = _constructed_groups(model, optimizer, settings)
    if class_of(optimizer) is Muon:
        singles = _divided_for_muon(model, singles, settings)
    merged: dict[tuple[float, float, str], Group] = {}
    for single in singles:
        lr = single.get("lr", settings["lr"])
        weight_decay = single.get("weight_decay", settings["weight_decay"])
        trainable = [param for param in single["params"] if param.requires_grad]
        if trainable:
            name = _name_of(single, lr, weight_decay)
            kind = {"use_muon": single["use_muon"]} if "use_muon" in single else {}
            group = merged.setdefault(
                (lr, weight_decay, name),
                {"params": [], "lr": lr, "weight_decay": weight_decay, "name": name, **kind},
            )
            group["params"].extend(trainable)
    if not merged:
        raise ConfigError("no parameter of the model trains: everything is frozen")
    return list(merged.values())


def _name_of(group: Group, lr: float, weight_decay: float) -> str:
    name = group.get("name") or group.get("group_name", f"lr {lr:g}, weight decay {weight_decay:g}")
    return f"{name}, Muon" if group.get("use_muon") else name


def _divided_for_muon(model: nn.Module, groups: Sequence[Group], settings: Mapping[str, Any]) -> list[Group]:
    """Each group as that of its matrices and that of all else. Raises ConfigError where no matrix trains, and
    for learning rates that have no ratio."""
    matrices = {param for param in block_matrices(model) if param.requires_grad}
    if not matrices:
        raise ConfigError(
            "optimizer Muon updates the matrices of the backbone's repeated blocks, and of "
            f"{type(model.get_submodule('backbone')).__name__} none of these trains (see engine.tune and the "
            "backbone's own freezing); use AdamW"
        )
    lr, adam_lr = settings["lr"], settings.get("adam_lr")
    if adam_lr is not None and not (lr > 0 and isinstance(adam_lr, (int, float)) and 0 <= adam_lr < math.inf):
        raise ConfigError(
            f"optimizer.adam_lr={adam_lr!r} must be a number of at least 0, beside an lr above 0 (it is {lr!r})"
        )
    ratio = 1.0 if adam_lr is None else adam_lr / lr
    divided = []
    for group in groups:
        rate = group.get("lr", lr)
        for use_muon, scaled in ((True, rate), (False, ratio * rate)):
            params = [param for param in group["params"] if (param in matrices) == use_muon]
            if params:
                divided.append({**group, "params": params, "lr": scaled, "use_muon": use_muon})
    return divided


def _optimizer_settings(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The section without what is for constructors, with lr and weight_decay as numbers. Raises
    ConfigError."""
    settings = {key: value for key, value in optimizer.items() if key not in ("constructor", "paramwise_cfg")}
    settings.setdefault("weight_decay", default_weight_decay(optimizer))
    if "lr" not in settings:
        raise ConfigError(
            f"optimizer has no lr; write optimizer=dict(type={optimizer.get('type', 'AdamW')!r}, lr=..., "
            "weight_decay=...)"
        )
    for required in ("lr", "weight_decay"):
        value = settings[required]
        if not _is_at_least_0(value):
            raise ConfigError(f"optimizer.{required}={value!r} must be a number of at least 0")
    return settings


def _constructed_groups(
    model: nn.Module, optimizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[Group]:
    """The groups as the optimizer constructor of the config makes them. Raises ConfigError where it
    cannot."""
    kind = optimizer.get("constructor", "DefaultOptimizerConstructor")
    if kind == "DefaultOptimizerConstructor":
        _check_paramwise(optimizer.get("paramwise_cfg") or {})
    paramwise_cfg = copy.deepcopy(optimizer.get("paramwise_cfg"))  # mmseg's constructors change it
    groups: list[Group] = []
    try:
        constructor = build_optimizer_constructor(
            {"type": kind, "optimizer_cfg": settings, "paramwise_cfg": paramwise_cfg}
        )
        constructor.add_params(groups, model)
    except UserError:
        raise
    except Exception as error:  # constructors raise errors of all kinds
        raise ConfigError(
            f"optimizer.constructor={kind!r} cannot work with backbone "
            f"{type(getattr(model, 'backbone', model)).__name__} and "
            f"paramwise_cfg={optimizer.get('paramwise_cfg')}: {reason_of(error)}"
        ) from error
    _check_own_settings(kind, settings, groups)
    return groups


def default_weight_decay(optimizer: Mapping[str, Any]) -> float:
    """The default of the optimizer's class, where the config's section sets none; 0 for a class that is not
    known or has none."""
    return float(getattr(_parameters(optimizer).get("weight_decay"), "default", 0.0))


def _parameters(optimizer: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """Those of the constructor of the optimizer's class. Raises ConfigError where there is no such class."""
    return inspect.signature(class_of(optimizer)).parameters


def _check_own_settings(constructor: str, settings: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Raises ConfigError where groups differ in another setting than learning rate and weight decay."""
    common = {
        name: settings.get(name, parameter.default)
        for name, parameter in _parameters(settings).items()
        if name not in ("params", "lr", "weight_decay")
    }
    for group in groups:
        for key in common.keys() & group.keys():
            if group[key] != common[key]:
                raise ConfigError(
                    f"optimizer.constructor={constructor!r} gives a group {key}={group[key]!r}, where the "
                    f"optimizer has {common[key]!r}; groups may differ in lr and weight_decay only"
                )


def _check_paramwise(paramwise_cfg: Any) -> None:
    """Raises ConfigError for keys that mmcv's DefaultOptimizerConstructor does not know: it ignores them."""
    if not isinstance(paramwise_cfg, Mapping):
        raise ConfigError(f"optimizer.paramwise_cfg={paramwise_cfg!r} must be a dict(...)")
    for key in paramwise_cfg:
        if key not in PARAMWISE:
            raise unknown_key(key, PARAMWISE, "optimizer.paramwise_cfg")
    _check_factors(paramwise_cfg, "optimizer.paramwise_cfg")
    custom_keys = paramwise_cfg.get("custom_keys") or {}
    if not isinstance(custom_keys, Mapping):
        raise ConfigError(f"optimizer.paramwise_cfg.custom_keys={custom_keys!r} must be a dict(...)")
    for name, settings in custom_keys.items():
        where = f"optimizer.paramwise_cfg.custom_keys[{name!r}]"
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{where}={settings!r} must be a dict(...) of {' and '.join(CUSTOM)}")
        for key in settings:
            if key not in CUSTOM:
                raise unknown_key(key, CUSTOM, where)
        _check_factors(settings, where)


def _check_factors(settings: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a factor (`..._mult`) of learning rate or weight decay that is no number of at
    least 0."""
    for key, value in settings.items():
        if key.endswith("_mult") and value is not None and not _is_at_least_0(value):
            raise ConfigError(f"{where}.{key}={value!r} must be a number of at least 0")


def _is_at_least_0(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def unmatched_custom_keys(model: nn.Module, optimizer: Mapping[str, Any]) -> list[str]:
    """A warning about those of `paramwise_cfg.custom_keys` that are in no parameter's name, and so change
    nothing; an empty list where there are none."""
    keys = (optimizer.get("paramwise_cfg") or {}).get("custom_keys") or {}
    names = [name for name, _ in model.named_parameters()]
    unmatched = [key for key in keys if not any(key in name for name in names)]
    if not unmatched:
        return []
    return [f"optimizer.paramwise_cfg.custom_keys: no parameter's name holds {shortened(unmatched)}"]


def groups_in(model: nn.Module, groups: Sequence[Group], names_of: nn.Module) -> list[Group]:
    """`groups` of the parameters of `names_of`, with the parameters of `model` that have the same names.
    Groups are made on a model on the meta device, since constructors look at shapes, which ZeRO-3 hides."""
    names = {id(param): name for name, param in names_of.named_parameters()}
    params = dict(model.named_parameters())
    return [{**group, "params": [params[names[id(param)]] for param in group["params"]]} for group in groups]


def named_groups(model: nn.Module, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """`groups` with the names of their parameters instead of the parameters: names, lr, weight_decay."""
    names = {id(param): name for name, param in model.named_parameters()}
    return [
        {
            "names": [names[id(param)] for param in group["params"]],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
