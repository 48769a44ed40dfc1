"""Building a segmentor: on the meta device, to read its structure; under `zero.Init` (ZeRO-3) or whole
(ZeRO-1/2), to train it.

In: the config's `model` section and a `DsConfig`. Out: a segmentor whose parameters are on their device,
partitioned under ZeRO-3. Their initial values depend only on the seed and the names of modules, so they are
the same under every stage, precision and number of processes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from mmcv import ConfigDict
from mmcv.cnn import ACTIVATION_LAYERS, CONV_LAYERS, NORM_LAYERS, PLUGIN_LAYERS, UPSAMPLE_LAYERS
from mmseg.models import build_segmentor
from mmseg.models.builder import MODELS
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

import internseg_ds.models  # noqa: F401 - registers the backbones and heads
from internseg_ds.config.argument_types import wrong_arguments
from internseg_ds.config.ds_config import DsConfig
from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.config.tuning_options import described
from internseg_ds.distributed.batch_norms import allow_any_device, count_batches_once
from internseg_ds.distributed.initial_values import initialise, initialise_adapters
from internseg_ds.distributed.precision import buffers_to_fp32
from internseg_ds.errors import ConfigError, nearest_argument, nearest_type, reason_of
from internseg_ds.models.activation_checkpointing import CheckpointingPolicy, set_recomputation
from internseg_ds.models.backbone import forget_pretrained
from internseg_ds.models.external_parameters import external_parameters
from internseg_ds.models.freezing import freeze
from internseg_ds.models.heads import evaluate_by_call
from internseg_ds.models.pixel_losses import losses_without_waits
from internseg_ds.models.tuning import TuningMode, tune, tune_like
from internseg_ds.seeding import derived_seed


def build_on_meta(model: ConfigDict) -> nn.Module:
    """The segmentor with shapes and without storage: it takes no memory, however large it is. In training
    mode.

    Raises ConfigError for arguments of our own classes that have another type than these are annotated with, and
    when mmseg cannot build it, with the constructor's own message.
    """
    if wrong := next(wrong_arguments(model, "model"), None):
        raise ConfigError(wrong)
    try:
        segmentor = _on_meta(model)
    except Exception as error:  # constructors raise errors of all kinds
        raise _construction_error(model, error) from error
    allow_any_device(segmentor)
    count_batches_once(segmentor)
    losses_without_waits(segmentor)
    return segmentor


def _construction_error(model: ConfigDict, error: Exception) -> ConfigError:
    """The error message for a model section whose construction raised `error`."""
    if (stages := _frozen_stages_at_fault(model)) is not None:
        return ConfigError(
            f"model.backbone.frozen_stages={stages!r} is not for this {model.backbone.type}, which can "
            f"be built without it: {reason_of(error)}; it says how many stages do not train, -1 for none"
        )
    zeros = ", ".join(_zeros(model, "model")) if isinstance(error, ZeroDivisionError) else ""
    hint = f"; of its settings these are 0: {zeros}" if zeros else nearest_argument(error, MODELS.module_dict)
    hint = hint or nearest_type(error, _registered())
    return ConfigError(f"the model section cannot be built: {reason_of(error)}{hint}")


def _registered() -> list[str]:
    """The names of all modules that a model section can name by its `type`."""
    layers = (NORM_LAYERS, CONV_LAYERS, ACTIVATION_LAYERS, PLUGIN_LAYERS, UPSAMPLE_LAYERS)
    return [name for registry in (MODELS, *layers) for name in registry.module_dict]


def _on_meta(model: ConfigDict) -> nn.Module:
    with torch.device("meta"), _NumbersOnHost(), _vectors_for_scalars():
        segmentor = build_segmentor(copy.deepcopy(model)).to("meta")  # mmseg changes its argument
    return segmentor.train()  # some backbones freeze their stages in `train`


def _frozen_stages_at_fault(model: ConfigDict) -> Any:
    """The `frozen_stages` of a backbone that can be built without them only; else None."""
    backbone = model.get("backbone")
    if not isinstance(backbone, ConfigDict) or backbone.get("frozen_stages", -1) == -1:
        return None
    try:
        _on_meta(ConfigDict(model, backbone=ConfigDict(backbone, frozen_stages=-1)))
    except Exception:  # for another reason
        return None
    return backbone.frozen_stages


def _zeros(value: Any, path: str) -> Iterator[str]:
    """The paths of the settings that are a whole number 0."""
    if isinstance(value, (Mapping, list, tuple)):
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _zeros(inner, f"{path}.{key}")
    elif isinstance(value, int) and not isinstance(value, bool) and value == 0:
        yield path


class _NumbersOnHost(TorchFunctionMode):
    """Inside, linspace, arange and tensor make their numbers on the CPU, linspace in fp32: constructors read
    the values. mmseg's transformers take drop-path rates out of a linspace."""

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
def _registered_as(change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, modules register a parameter of `change(its data)` in place of one; where that is None, the
    parameter as it is."""

    def changed(_: nn.Module, __: str, param: nn.Parameter | None) -> nn.Parameter | None:
        data = None if param is None else change(param.data)
        return None if param is None or data is None else nn.Parameter(data, param.requires_grad)

    # torch's annotation leaves out the result of the hook, which its documentation defines
    register: Any = register_module_parameter_registration_hook
    hook = register(changed)
    try:
        yield
    finally:
        hook.remove()


def _vectors_for_scalars() -> AbstractContextManager[None]:
    """Inside, a parameter without dimensions (mmcv's `Scale`), which ZeRO-3 cannot partition, is registered
    as a vector of one element."""
    return _registered_as(lambda data: None if data.dim() > 0 else data.view(1))


def set_activation_checkpointing(segmentor: nn.Module, recomputation: str | int) -> None:
    """Applies `engine.recomputation` to a built segmentor.

    recomputation: a `CheckpointingPolicy`. "config" (keep what the config's `with_cp` says) and "auto" (not
    chosen yet) change nothing. Raises ConfigError for a policy that this backbone does not have.
    """
    if recomputation in ("config", "auto"):
        return
    try:
        set_recomputation(segmentor, cast(CheckpointingPolicy, recomputation))  # raises for any other
    except ValueError as error:
        raise ConfigError(
            f'engine.recomputation={recomputation!r} cannot be: {error}; "config" leaves it to the '
            'backbone\'s with_cp, and "auto" to the memory estimate'
        ) from None


def choose_trained(segmentor: nn.Module, options: EngineOptions) -> None:
    """Applies `engine.tune` and `engine.freeze` to a segmentor on the meta device, before its parameter groups
    are made.

    Raises ConfigError for blocks, layers or names that it does not have, and where `engine.freeze` leaves
    nothing of what `engine.tune` trains.
    """
    asked = described(options.tune)
    try:
        tune(segmentor, options.tune)
    except ValueError as error:
        raise ConfigError(f"engine.tune={asked!r} cannot be: {error}") from None
    freeze_parts(segmentor, options.freeze)
    backbone = segmentor.get_submodule("backbone")
    if not isinstance(options.tune, str) and not any(param.requires_grad for param in backbone.parameters()):
        raise ConfigError(f"engine.tune={asked!r}, but engine.freeze={list(options.freeze)!r} freezes it all")


def tune_for_training(
    segmentor: nn.Module, mode: TuningMode, meta_model: nn.Module, ds: DsConfig, seed: int
) -> None:
    """Applies `engine.tune` to a segmentor of `build_for_training`, as `choose_trained` did to `meta_model`.
    Initial values of adapters depend on seed and names alone. Collective under ZeRO-3.

    Adapters are added after all other initial values were drawn, which they therefore do not change.
    """
    if mode == "all":
        return
    if ds.stage == 3:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=ds.raw):
            tune_like(segmentor, meta_model)
    else:
        tune_like(segmentor, meta_model)
    initialise_adapters(segmentor, seed, ds.param_dtype)


def freeze_parts(segmentor: nn.Module, names: Sequence[str]) -> None:
    """Applies `engine.freeze` to a built segmentor, before its parameter groups are made.

    names: of modules and parameters. Raises ConfigError for a name that the segmentor does not have.
    """
    try:
        freeze(segmentor, names)
    except ValueError as error:
        raise ConfigError(f"engine.freeze={list(names)!r} cannot be: {error}") from None


def build_for_training(model: ConfigDict, ds: DsConfig, device: torch.device, seed: int) -> nn.Module:
    """The segmentor with initial values, in `ds.param_dtype`, on `device`, in training mode. Collective under
    ZeRO-3, where each rank has its shard of every parameter only."""
    # constructors that draw values which nothing draws again
    torch.manual_seed(derived_seed(seed, "constructors"))
    if ds.stage == 3:
        segmentor = _build_partitioned(model, ds)
    else:
        with torch.device(device), _default_dtype(ds.param_dtype), _NumbersOnHost(), _vectors_for_scalars():
            segmentor = build_segmentor(copy.deepcopy(model)).to(device)
    segmentor.train()  # some backbones freeze their stages in `train`; as in `build_on_meta`
    forget_pretrained(segmentor)
    allow_any_device(segmentor)
    count_batches_once(segmentor)
    losses_without_waits(segmentor)
    buffers_to_fp32(segmentor)
    initialise(segmentor, seed, ds.param_dtype)
    return segmentor


def _build_partitioned(model: ConfigDict, ds: DsConfig) -> nn.Module:
    """Under ZeRO-3, with the values that constructors give. Collective."""
    import deepspeed

    # no dtype argument: deepspeed 0.19.8 turns dtype=torch.float32 into bf16 where fp16 is not supported
    # (CPUs); the config has the same dtype
    try:
        with deepspeed.zero.Init(config_dict_or_path=ds.raw), _vectors_for_scalars():
            segmentor = build_segmentor(copy.deepcopy(model))
    except (RuntimeError, ValueError) as error:
        # a partitioned parameter has neither size nor dimensions
        if not any(mark in str(error) for mark in ("Fan in and fan out", "size of tensor a (0)")):
            raise
        raise ConfigError(
            f"the model cannot be built under ZeRO-3, whose parameters are partitioned as soon as they are made: "
            f"{reason_of(error)}; where a constructor computes with them, use ZeRO-1 or 2"
        ) from error
    evaluate_by_call(segmentor)
    for module in segmentor.modules():
        for param in external_parameters(module).values():
            deepspeed.zero.register_external_parameter(module, param)
    return segmentor


def constructed_buffers(model: ConfigDict) -> dict[str, Tensor]:
    """The buffers of a segmentor with the values that constructors give (tables of positions, which files do not
    hold), on the CPU. Its parameters take no memory."""
    with torch.device("cpu"), _registered_as(lambda data: data.to("meta")), _vectors_for_scalars():
        segmentor = build_segmentor(copy.deepcopy(model))
    return dict(segmentor.named_buffers())


def fill(
    model: nn.Module, parameter: Callable[[str, torch.Size], Tensor], buffer: Callable[[str, Tensor], Tensor]
) -> None:
    """Gives every parameter and buffer of a model on the meta device a value. The parameters are frozen after
    it.

    parameter: called with name and shape, returns the whole value. buffer: called with name and meta tensor,
    returns the value. Both are called in the order of the modules.
    """
    for owner_name, owner in model.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        for name, param in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(parameter(prefix + name, param.shape), requires_grad=False))
        for name, on_meta in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer(prefix + name, on_meta))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
