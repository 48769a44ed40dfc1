"""Precision: which part of a segmentor computes in which dtype, whatever dtype its parameters have. Modules
never decide this themselves.

All parameters of a DeepSpeed engine have one dtype: bf16 (`bf16` ds_configs) or fp32 (`zero3_autocast`). From
that:

    image --cast--> backbone (bf16, or fp32) --cast to fp32--> heads (fp32) --> losses (fp32)
                                             --cast to bf16--> heads (bf16, where asked for)
                                                                   --> class scores (fp32) --> losses (fp32)

The casts before and after the backbone are forward hooks. Where a part computes in another dtype than that of
the parameters, its modules cast their own weights when they read them: names, gathering and dtype of the
parameters stay as they are, and gradients are cast back to that dtype.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from internseg_ds.config.ds_config import Precision
from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.errors import ConfigError
from internseg_ds.models.block_execution.float8_linear import float8_layers
from internseg_ds.models.derived_class import derived_class
from internseg_ds.models.heads import heads as heads_of
from internseg_ds.models.repeated_blocks import repeated_blocks
from internseg_ds.torch_internals import NORM_WITH_MOMENTS, cpu_multiplies_bf16, tree_leaves

log = logging.getLogger(__name__)


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16 matrix products. A CPU without AVX-512 uses scalar loops
    instead, some 75 times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bf16()


class ComputeDtypes(NamedTuple):
    """The dtypes in which the parts of a segmentor compute."""

    backbone: torch.dtype
    heads: torch.dtype


def compute_dtypes(
    options: EngineOptions, segmentor: nn.Module, device: torch.device, precision: Precision = "bf16"
) -> ComputeDtypes:
    """Both dtypes of a run. precision: of its ds_config. Raises ConfigError where they are not possible."""
    return ComputeDtypes(
        backbone_dtype(options.backbone_dtype, device, precision),
        heads_dtype(options.heads_dtype, segmentor, precision),
    )


def backbone_dtype(
    requested: Literal["auto", "bfloat16", "float32"], device: torch.device, precision: Precision = "bf16"
) -> torch.dtype:
    """The dtype in which the backbone computes on `device`.

    requested: the config's engine.backbone_dtype; "auto", the default, is bf16 where `computes_bf16`.
    precision: of the ds_config. With "fp32" (parameters in fp32, no autocast) only fp32 is possible; raises
    ConfigError where bfloat16 is requested.
    """
    if precision == "fp32":
        if requested == "bfloat16":
            raise ConfigError(
                "engine.backbone_dtype='bfloat16' needs bf16 weights or autocast; enable bf16 or "
                "torch_autocast in the ds_config"
            )
        return torch.float32
    if requested == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return getattr(torch, requested)


def heads_dtype(
    requested: Literal["float32", "bfloat16"], segmentor: nn.Module, precision: Precision = "bf16"
) -> torch.dtype:
    """The dtype in which the heads of `segmentor` compute.

    requested: the config's engine.heads_dtype. precision: of the ds_config. Raises ConfigError where bfloat16
    is requested and not possible.
    """
    if requested == "bfloat16":
        if precision == "fp32":
            raise ConfigError(
                "engine.heads_dtype='bfloat16' needs bf16 weights or autocast; enable bf16 or "
                "torch_autocast in the ds_config"
            )
        for head in heads_of(segmentor):
            _check_head_in_bf16(head)
    return getattr(torch, requested)


def _check_head_in_bf16(head: nn.Module) -> None:
    """Raises ConfigError for a head whose class scores would not all come from `conv_seg`, which stays
    fp32."""
    scores = getattr(head, "conv_seg", None)
    if not isinstance(scores, nn.Conv2d):
        raise ConfigError(
            f"engine.heads_dtype='bfloat16' is not for {type(head).__name__}: it has no conv_seg, "
            "from which on scores and losses are fp32; drop it"
        )
    for name, layer in head.named_modules():
        if layer in (head, scores):  # mmseg's heads have out_channels themselves
            continue
        if getattr(layer, "out_channels", getattr(layer, "out_features", None)) == head.num_classes:
            raise ConfigError(
                f"engine.heads_dtype='bfloat16' is not for {type(head).__name__}: its {name} makes "
                "class scores too, which would not be fp32; drop it"
            )


def check_float8(
    options: EngineOptions,
    segmentor: nn.Module,
    dtypes: ComputeDtypes,
    device: torch.device,
    precision: Precision,
) -> None:
    """Raises ConfigError where engine.matmul_dtype asks for float8 products which this run cannot have.

    segmentor: on the meta device. precision: of the ds_config.
    """
    if options.matmul_dtype != "float8":
        return
    asked = "engine.matmul_dtype='float8'"
    # under ROCm "cuda" is an AMD GPU, whose capability is another number; MI300's float8 is not e4m3 (FNUZ)
    if (
        device.type != "cuda"
        or torch.version.hip is not None
        or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY
    ):
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ConfigError(
            f"{asked} needs an NVIDIA GPU that multiplies float8 (Ada, Hopper or newer: compute capability 8.9), and "
            f"this run is on {here}; set engine.matmul_dtype='bfloat16'"
        )
    if precision != "bf16" or dtypes.backbone != torch.bfloat16:
        raise ConfigError(
            f"{asked} needs bf16 weights and a backbone that computes in bf16; enable bf16 in the ds_config and "
            "leave engine.backbone_dtype at 'auto', or set engine.matmul_dtype='bfloat16'"
        )
    backbone = segmentor.get_submodule("backbone")
    if not any(float8_layers(block) for block in repeated_blocks(backbone)):
        raise ConfigError(
            f"{asked}, but no repeated block of {type(backbone).__name__} has a linear layer whose sizes are "
            "multiples of 16; set engine.matmul_dtype='bfloat16'"
        )


FLOAT8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply float8."""


def set_fp32_matmul(mode: Literal["tf32", "ieee"], device: torch.device) -> None:
    """Sets how this process's GPU computes products and convolutions of fp32 tensors. Does nothing where
    `device` is no GPU.

    torch's default is TF32 in cuDNN's convolutions and full fp32 in matrix products. These are torch's older
    switches, which all versions have: once the newer `fp32_precision` is set, torch 2.13 raises
    when its own code (`torch.compile`) reads the older ones.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        torch.backends.cudnn.allow_tf32 = mode == "tf32"
        log.info(
            "fp32 products and convolutions on the GPU in %s (engine.fp32_matmul)",
            {"tf32": "TF32", "ieee": "full fp32"}[mode],
        )


def apply_precision(
    segmentor: nn.Module, compute: torch.dtype, *, heads: torch.dtype = torch.float32, autocast: bool = False
) -> None:
    """Makes `segmentor.backbone` compute in `compute`, and everything else in `heads`. Once for each model,
    before deepspeed.initialize.

    compute, heads: torch.bfloat16 or torch.float32. autocast: parameters are fp32 and the caller runs the
    model under torch.autocast, which then casts inside the backbone.

    In a bf16 backbone, batch norms and mmcv's compiled operators, which have no bf16 kernels, compute in
    fp32; a backbone without `follows_dtype` (it computes in the dtype of its input) runs under
    torch.autocast. In bf16 heads, norms have fp32 parameters, moments and sums, and class scores (`conv_seg`)
    are fp32. Batch-norm statistics and other buffers become fp32.
    """
    for name, child in segmentor.named_children():
        if name != "backbone" and heads == torch.bfloat16:
            scores = [head.get_submodule("conv_seg") for head in heads_of(segmentor)]
            compute_in_bf16(child, except_for=scores)
            _compiled_in_fp32(child)
        elif name != "backbone" or compute == torch.float32:
            compute_in_fp32(child)
    buffers_to_fp32(segmentor)
    backbone = segmentor.get_submodule("backbone")
    if compute == torch.bfloat16:
        _compiled_in_fp32(backbone)
        if not autocast:
            _norms_with_moments_in_fp32(backbone)
            if not getattr(backbone, "follows_dtype", False):
                kind: Any = type(backbone)  # mypy takes a type[nn.Module] for unhashable
                backbone.__class__ = _autocasting_class(kind)
    entry = torch.float32 if autocast else compute
    backbone.register_forward_pre_hook(lambda _, args: tuple(_cast(arg, entry) for arg in args))
    backbone.register_forward_hook(lambda _, __, features: _cast(features, heads))


def buffers_to_fp32(segmentor: nn.Module) -> None:
    """Converts batch-norm statistics and other floating-point buffers to fp32, whatever dtype the parameters
    have. Before values are loaded into them, which would be rounded."""
    for owner in segmentor.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(owner, name, buffer.float())


def compute_in_fp32(module: nn.Module) -> None:
    """Gives every module in `module` that owns parameters a subclass of its class that computes in fp32."""
    for owner in _owners(module):
        _compute_in(owner, torch.float32, torch.float32, leaf=_is_leaf(owner))


def compute_in_bf16(module: nn.Module, except_for: Sequence[nn.Module] = ()) -> None:
    """Gives every module in `module` that owns parameters a subclass of its class that computes in bf16, or
    in fp32 if it is in `except_for`. Norms compute in fp32 and return bf16."""
    for owner in _owners(module):
        exact = any(owner is other for other in except_for)
        is_norm = isinstance(owner, (NORM_WITH_MOMENTS, nn.LayerNorm, nn.GroupNorm))
        compute = torch.float32 if exact or is_norm else torch.bfloat16
        result = torch.float32 if exact else torch.bfloat16
        _compute_in(owner, compute, result, leaf=_is_leaf(owner))


def _norms_with_moments_in_fp32(backbone: nn.Module) -> None:
    """Makes norms with fp32 moments compute in fp32 and return bf16: torch's take weights and moments of one
    dtype only."""
    for norm in backbone.modules():
        if isinstance(norm, NORM_WITH_MOMENTS) and norm.affine:
            _compute_in(norm, torch.float32, torch.bfloat16, leaf=True)


def _compiled_in_fp32(module: nn.Module) -> None:
    """Makes modules of mmcv's compiled operators compute in fp32, with all that is inside them, and return
    bf16: the operators have no kernels for bf16."""
    inside: set[nn.Module] = set()
    for operator in list(module.modules()):
        if operator not in inside and any(
            kind.__module__.startswith("mmcv.ops.") for kind in type(operator).__mro__
        ):
            inside.update(operator.modules())
            for child in operator.children():
                compute_in_fp32(child)
            _compute_in(operator, torch.float32, torch.bfloat16, leaf=True)


def _compute_in(module: nn.Module, compute: torch.dtype, result: torch.dtype, *, leaf: bool) -> None:
    """Gives `module` a subclass of its class, as of `_casting_class`."""
    kind: Any = type(module)  # mypy takes a type[nn.Module] for unhashable
    module.__class__ = _casting_class(kind, compute, result, leaf=leaf)


def _owners(module: nn.Module) -> list[nn.Module]:
    return [owner for owner in module.modules() if any(True for _ in owner.parameters(recurse=False))]


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


@functools.cache
def _casting_class(
    owner_class: type[nn.Module], compute: torch.dtype, result: torch.dtype, *, leaf: bool
) -> type[nn.Module]:
    """A subclass of `owner_class` that returns copies in `compute` when its parameters are read as
    attributes, by itself or by others. `parameters()` returns the parameters themselves.

    leaf: its forward also gets its inputs in `compute`, with autocast off, and returns tensors in `result`.
    Modules with children (nn.MultiheadAttention, a block with a scale of its own) leave both to the children.
    """

    # torch calls it for each read of a parameter; under ZeRO-3 they are whole while a forward pass reads them
    def __getattr__(self: nn.Module, name: str) -> Any:
        value = owner_class.__getattr__(self, name)
        return value.to(compute) if isinstance(value, nn.Parameter) and value.is_floating_point() else value

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(_device_type(args), enabled=False):
            return _cast(owner_class.forward(self, *(_cast(arg, compute) for arg in args), **kwargs), result)

    word = "Fp32" if compute == torch.float32 else "Bf16"
    body = {"__getattr__": __getattr__} | ({"forward": forward} if leaf else {})
    return derived_class(
        owner_class, body, word=word, doc=f"{owner_class.__name__}, computed in {word.lower()}."
    )


@functools.cache
def _autocasting_class(owner_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `owner_class` whose forward runs under torch.autocast in bf16. Without its cache of cast
    weights: they are bf16 already."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(_device_type(args), torch.bfloat16, cache_enabled=False):
            return owner_class.forward(self, *args, **kwargs)

    return derived_class(
        owner_class, {"forward": forward}, word="Autocast", doc=f"{owner_class.__name__}, under autocast."
    )


def _device_type(args: tuple[Any, ...]) -> str:
    """The type of the device of a forward pass, by its arguments; "cpu" for meta tensors, for which there is
    no autocast."""
    kinds = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)} - {"meta"}
    return next(iter(kinds), "cpu")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`, also those in lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value
