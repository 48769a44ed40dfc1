"""Building a segmentor: on the meta device to look at, under `zero.Init` (ZeRO-3) or whole (ZeRO-1/2) to train.

In: the config's `model` section and a `DsConfig`. Out: a segmentor whose parameters sit on their device, partitioned where the stage says so, with
initial values that depend on the seed and the parameter's name alone: the same under every stage, precision and number of processes.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmcv import ConfigDict
from mmcv.cnn import ConvModule
from mmcv.runner import BaseModule
from mmseg.models import build_segmentor
from mmseg.models.builder import MODELS
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

import internseg_ds.models  # noqa: F401 - registers the backbones and heads
from internseg_ds.distributed.ds_config import DsConfig
from internseg_ds.distributed.precision import buffers_to_fp32
from internseg_ds.distributed.sync_batch_norm import allow_any_device
from internseg_ds.errors import ConfigError, nearest_argument, reason_of
from internseg_ds.models.backbone import forget_pretrained
from internseg_ds.models.external_parameters import external_parameters
from internseg_ds.models.freezing import freeze
from internseg_ds.models.heads import evaluate_by_call
from internseg_ds.models.pixel_losses import losses_without_waits
from internseg_ds.models.recomputation import set_recomputation
from internseg_ds.seeding import derived_seed


def build_on_meta(model: ConfigDict) -> nn.Module:
    """The segmentor with shapes and no storage: takes no memory at any size.

    Raises ConfigError when mmseg cannot build it, in the words of whichever constructor refused.
    """
    try:
        segmentor = _on_meta(model)
    except Exception as error:  # whatever some constructor refuses with
        if (stages := _not_to_be_frozen(model)) is not None:
            raise ConfigError(
                f"model.backbone.frozen_stages={stages!r} is not for this {model.backbone.type}, which can be built without it: "
                f"{reason_of(error)}; it says how many stages do not train, -1 for none"
            ) from error
        zeros = ", ".join(_zeros(model, "model")) if isinstance(error, ZeroDivisionError) else ""
        hint = (
            f"; of its settings these are 0: {zeros}"
            if zeros
            else nearest_argument(error, MODELS.module_dict)
        )
        raise ConfigError(f"the model section cannot be built: {reason_of(error)}{hint}") from error
    allow_any_device(segmentor)
    losses_without_waits(segmentor)
    return segmentor


def _on_meta(model: ConfigDict) -> nn.Module:
    with torch.device("meta"), _HostSequences(), _vectors_for_scalars():
        segmentor = build_segmentor(copy.deepcopy(model)).to("meta")  # mmseg writes into what it is given
    return segmentor.train()  # where some backbones freeze their stages


def _not_to_be_frozen(model: ConfigDict) -> Any:
    """The `frozen_stages` of a backbone that cannot be built with it, and can be without."""
    backbone = model.get("backbone")
    if not isinstance(backbone, ConfigDict) or backbone.get("frozen_stages", -1) == -1:
        return None
    try:
        _on_meta(ConfigDict(model, backbone=ConfigDict(backbone, frozen_stages=-1)))
    except Exception:  # for another reason
        return None
    return backbone.frozen_stages


def _zeros(value: Any, path: str) -> Iterator[str]:
    """The settings that are a whole number 0, by their paths."""
    if isinstance(value, (Mapping, list, tuple)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _zeros(inner, f"{path}.{key}")
    elif isinstance(value, int) and not isinstance(value, bool) and value == 0:
        yield path


class _HostSequences(TorchFunctionMode):
    """Inside: sequences of numbers are made on the CPU in fp32, for constructors read them: mmseg's transformers take drop-path rates out of a linspace."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.linspace, torch.arange, torch.tensor):
            kwargs.setdefault("device", "cpu")
            if func is torch.linspace:
                kwargs.setdefault("dtype", torch.float32)
        return func(*args, **kwargs)


@contextmanager
def _vectors_for_scalars() -> Iterator[None]:
    """Inside: a parameter without dimensions (mmcv's `Scale`), which ZeRO-3 cannot partition, is registered as a vector of one element."""

    def one_element(_: nn.Module, __: str, param: nn.Parameter | None) -> nn.Parameter | None:
        return (
            nn.Parameter(param.data.view(1), param.requires_grad)
            if param is not None and param.dim() == 0
            else None
        )

    hook = register_module_parameter_registration_hook(one_element)
    try:
        yield
    finally:
        hook.remove()


def choose_recomputation(segmentor: nn.Module, recomputation: str | int) -> None:
    """Applies `engine.recomputation` to a built segmentor; "config" leaves it as its config's `with_cp` says, "auto" until it is chosen.

    Raises ConfigError for what cannot be.
    """
    if recomputation in ("config", "auto"):
        return
    try:
        set_recomputation(segmentor, recomputation)
    except ValueError as error:
        raise ConfigError(
            f'engine.recomputation={recomputation!r} cannot be: {error}; "config" leaves it to the backbone\'s with_cp, '
            'and "auto" to the plan of the memory'
        ) from None


def freeze_parts(segmentor: nn.Module, names: Sequence[str]) -> None:
    """Applies `engine.freeze` to a built segmentor, before its parameter groups are made. Raises ConfigError for a name that is none."""
    try:
        freeze(segmentor, names)
    except ValueError as error:
        raise ConfigError(f"engine.freeze={list(names)!r} cannot be: {error}") from None


def build_for_training(model: ConfigDict, ds: DsConfig, device: torch.device, seed: int) -> nn.Module:
    """The segmentor with initial values, in `ds.param_dtype`, on `device`. Collective under ZeRO-3, where each rank keeps its share only."""
    import deepspeed

    if ds.stage == 3:
        # no dtype argument: deepspeed 0.19.8 turns dtype=torch.float32 into bf16 where fp16 is not supported (CPUs); the config says the same
        with deepspeed.zero.Init(config_dict_or_path=ds.raw), _vectors_for_scalars():
            segmentor = build_segmentor(copy.deepcopy(model))
        evaluate_by_call(segmentor)
        for module in segmentor.modules():
            for param in external_parameters(module).values():
                deepspeed.zero.register_external_parameter(module, param)
    else:
        with torch.device(device), _default_dtype(ds.param_dtype), _HostSequences(), _vectors_for_scalars():
            segmentor = build_segmentor(copy.deepcopy(model)).to(device)
    segmentor.train()  # where some backbones freeze their stages, as `build_on_meta` has it
    forget_pretrained(segmentor)
    allow_any_device(segmentor)
    losses_without_waits(segmentor)
    buffers_to_fp32(segmentor)
    initialise(segmentor, seed, ds.param_dtype)
    return segmentor


def initialise(segmentor: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Draws the initial values in fp32, gathering the parameters of one owner at a time. Collective under ZeRO-3.

    Three rounds, as mmcv orders them: every module that owns parameters (`reset_parameters`), every ConvModule, then every part of the segmentor that
    brings an `init_cfg` or an `init_weights` of its own. A module with none of these keeps the values that its constructor gave it.
    """
    for name, module in segmentor.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(
            module, "_reset_parameters", None
        )  # torch's MultiheadAttention has a private one
        if reset is not None:
            torch.manual_seed(derived_seed(seed, name))
            with _whole_fp32(list(module.parameters(recurse=False)), dtype):
                reset()
    for name, module in segmentor.named_modules():
        if isinstance(module, ConvModule):
            torch.manual_seed(derived_seed(seed, name + "#conv"))
            with _whole_fp32(list(module.parameters()), dtype):
                module.init_weights()
    for name, part in _parts(segmentor):
        if _initialises_itself(part):
            torch.manual_seed(derived_seed(seed, name + "#init"))
            with _whole_fp32(list(part.parameters()), dtype):
                logging.disable(logging.INFO)  # mmcv logs every parameter that it sets
                try:
                    part.init_weights()
                finally:
                    logging.disable(logging.NOTSET)


def _parts(segmentor: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Backbone, neck and heads by their names; of several heads in a list each by itself."""
    for name, child in segmentor.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{place}", part) for place, part in child.named_children())
        else:
            yield name, child


def _initialises_itself(module: nn.Module) -> bool:
    parts = [part for part in module.modules() if isinstance(part, BaseModule)]
    return any(
        part.init_cfg is not None or type(part).init_weights is not BaseModule.init_weights for part in parts
    )


def fill(
    model: nn.Module, parameter: Callable[[str, torch.Size], Tensor], buffer: Callable[[str, Tensor], Tensor]
) -> None:
    """Gives every parameter and buffer of a model on the meta device a value; parameters stay frozen.

    parameter(name, shape) and buffer(name, its meta tensor): the value of one, whole. Called in the order of the modules.
    """
    for owner_name, owner in model.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        for name, param in owner.named_parameters(recurse=False):
            owner._parameters[name] = nn.Parameter(parameter(prefix + name, param.shape), requires_grad=False)
        for name, hollow in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer(prefix + name, hollow)


@contextmanager
def gathered(params: Sequence[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """The parameters whole inside the block; a plain block where ZeRO has not partitioned them. Collective where it has.

    modifier_rank: the rank whose changes every rank keeps; None when nothing changes.
    """
    partitioned = [param for param in params if hasattr(param, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


@contextmanager
def _whole_fp32(params: list[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Inside: whole fp32 values to draw into. After: those of rank 0, rounded to `dtype`."""
    with gathered(params, modifier_rank=0):
        for param in params:
            param.data = param.data.float()
        with torch.no_grad():
            yield
        for param in params:
            param.data = param.data.to(dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
