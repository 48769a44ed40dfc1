"""The initial values of a segmentor's parameters, whole or partitioned by ZeRO-3: drawn in fp32, rounded to
the parameters' dtype, and the same under every stage, precision and number of processes, since they depend
only on the seed and on names.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmcv.runner import BaseModule
from torch import nn
from torch.overrides import TorchFunctionMode

from internseg_ds.distributed.zero_internals import is_partitioned
from internseg_ds.lora_names import is_factor
from internseg_ds.models.lora import adapters, reset_adapter
from internseg_ds.seeding import derived_seed
from internseg_ds.torch_internals import reset_parameters_of, tree_leaves


def initialise(segmentor: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Draws the initial values in fp32 and rounds them to `dtype`, gathering the parameters of one module at
    a time. Collective under ZeRO-3.

    Three rounds, in mmcv's order: every module that owns parameters (`reset_parameters`), every ConvModule,
    then every part of the segmentor that has an `init_cfg` or an `init_weights` of its own. A module with
    none of these keeps the values that its constructor gave it. A part that has `initial_values` (see
    `Backbone`) is left to that alone.
    """
    parts = dict(_parts(segmentor))
    drawing_themselves = tuple(f"{name}." for name, part in parts.items() if hasattr(part, "initial_values"))
    for name, module in segmentor.named_modules():
        if f"{name}.".startswith(drawing_themselves):
            continue
        if (reset := reset_parameters_of(module)) is not None:
            torch.manual_seed(derived_seed(seed, name))
            with _whole_fp32(list(module.parameters(recurse=False)), dtype):
                reset()
    for name, module in segmentor.named_modules():
        if isinstance(module, ConvModule) and not f"{name}.".startswith(drawing_themselves):
            torch.manual_seed(derived_seed(seed, name + "#conv"))
            with _whole_fp32(list(module.parameters()), dtype):
                module.init_weights()
    for name, part in parts.items():
        draw: Callable[[], None] | None = getattr(part, "initial_values", None)
        if draw is not None:
            names = {param: f"{name}.{inner}" for inner, param in part.named_parameters()}
            with torch.no_grad(), _WholeWhenUsed(names, seed, dtype):
                draw()
        elif _initialises_itself(part):
            init_weights: Any = part.init_weights
            torch.manual_seed(derived_seed(seed, name + "#init"))
            with _whole_fp32(list(part.parameters()), dtype):
                logging.disable(logging.INFO)  # mmcv logs every parameter that it sets
                try:
                    init_weights()
                finally:
                    logging.disable(logging.NOTSET)


def initialise_adapters(segmentor: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Draws the initial values of low-rank adapters in the same way, one layer at a time. Collective under
    ZeRO-3."""
    for name, layer in adapters(segmentor).items():
        torch.manual_seed(derived_seed(seed, name))
        factors = [param for inner, param in layer.named_parameters() if is_factor(f".{inner}")]
        with _whole_fp32(factors, dtype):
            reset_adapter(layer)


def _parts(segmentor: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Backbone, neck and heads with their names; each head of a list by itself."""
    for name, child in segmentor.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", part) for index, part in child.named_children())
        else:
            yield name, child


def _initialises_itself(module: nn.Module) -> bool:
    parts = [part for part in module.modules() if isinstance(part, BaseModule)]
    return any(
        part.init_cfg is not None or type(part).init_weights is not BaseModule.init_weights for part in parts
    )


class _WholeWhenUsed(TorchFunctionMode):
    """Inside, a parameter that a torch function is given is whole and fp32, and random numbers depend on the
    seed and its name.

    It stays so until a function is given another one: then it is rounded and partitioned again (in bf16, one
    that is changed again later is rounded twice). For methods that set the values of a whole model, of which a
    rank has room for a part only. Collective under ZeRO-3.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._names = names
        self._seed = seed
        self._dtype = dtype
        self._whole: frozenset[nn.Parameter] = frozenset()
        self._open = ExitStack()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)]
        asked = tuple(param for param in dict.fromkeys(given) if param in self._names)
        if not self._whole.issuperset(asked):
            self._open.close()
            self._open.enter_context(_whole_fp32(list(asked), self._dtype))
            self._whole = frozenset(asked)
            torch.manual_seed(derived_seed(self._seed, self._names[asked[0]]))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()


@contextmanager
def gathered(params: Sequence[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """Inside, the parameters are whole. Collective if ZeRO-3 has partitioned any of them.

    modifier_rank: the rank whose changes every rank gets; None when nothing is changed.
    """
    partitioned = [param for param in params if is_partitioned(param)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


@contextmanager
def _whole_fp32(params: list[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Inside, the parameters are whole and fp32. Afterwards they are those of rank 0, rounded to `dtype`."""
    with gathered(params, modifier_rank=0):
        for param in params:
            param.data = param.data.float()
        with torch.no_grad():
            yield
        for param in params:
            param.data = param.data.to(dtype)
