"""Precision: which part of a segmentor computes in which dtype, whatever dtype ZeRO stores its parameters in. Modules never decide this themselves.

All parameters of a DeepSpeed engine share one dtype: bf16 (`bf16` ds_configs) or fp32 (`zero3_autocast`). Out of that:

    image --cast--> backbone (bf16, or fp32) --cast to fp32--> heads (fp32) --> losses (fp32)
                                             --cast to bf16--> heads (bf16, where asked for) --> scores of the classes (fp32) --> losses (fp32)

The casts at the backbone's border are forward hooks. Where a part computes in another dtype than the stored one, its modules cast their own weights where
they are read: parameter names, gathering and the stored dtype stay as they are, and gradients flow back into the stored dtype.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from internseg_ds.distributed.ds_config import Precision
from internseg_ds.errors import ConfigError
from internseg_ds.models.derived_class import derived_class
from internseg_ds.models.heads import heads as heads_of

log = logging.getLogger(__name__)


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices natively. A CPU without AVX-512 falls back to scalar loops there, some 75 times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def backbone_dtype(
    requested: Literal["auto", "bfloat16", "float32"], device: torch.device, precision: Precision = "bf16"
) -> torch.dtype:
    """The dtype in which the backbone computes on `device`; "auto" (the config's default) is bf16 where that is native.

    precision: of the ds_config. With "fp32" parameters and no autocast only fp32 can be computed: raises ConfigError where bfloat16 is asked for.
    """
    if precision == "fp32":
        if requested == "bfloat16":
            raise ConfigError(
                "engine.backbone_dtype='bfloat16' needs bf16 weights or autocast; enable bf16 or torch_autocast in the ds_config"
            )
        return torch.float32
    if requested == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return getattr(torch, requested)


def heads_dtype(
    requested: Literal["float32", "bfloat16"], segmentor: nn.Module, precision: Precision = "bf16"
) -> torch.dtype:
    """The dtype in which the heads of `segmentor` compute. Raises ConfigError where bfloat16 is asked for and cannot be."""
    if requested == "bfloat16":
        if precision == "fp32":
            raise ConfigError(
                "engine.heads_dtype='bfloat16' needs bf16 weights or autocast; enable bf16 or torch_autocast in the ds_config"
            )
        for head in heads_of(segmentor):
            if not isinstance(getattr(head, "conv_seg", None), nn.Conv2d):
                raise ConfigError(
                    f"engine.heads_dtype='bfloat16' is not for {type(head).__name__}: it has no conv_seg, "
                    "from which on scores and losses are fp32; drop it"
                )
            for name, layer in head.named_modules():
                if layer in (head, head.conv_seg):  # mmseg's heads have out_channels themselves
                    continue
                if getattr(layer, "out_channels", getattr(layer, "out_features", None)) == head.num_classes:
                    raise ConfigError(
                        f"engine.heads_dtype='bfloat16' is not for {type(head).__name__}: its {name} makes class scores too, "
                        "which would not be fp32; drop it"
                    )
    return getattr(torch, requested)


def set_fp32_matmul(mode: Literal["tf32", "ieee"], device: torch.device) -> None:
    """How this process's GPU computes products and convolutions of fp32 tensors from now on; nothing where `device` is no GPU.

    torch's own default is TF32 in cuDNN's convolutions and full fp32 in matrix products. These switches are torch's older ones, which all versions from 2.7
    on have: once the newer `fp32_precision` is set, torch 2.13 raises when its own code (`torch.compile`) reads the older ones.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == "tf32"
        log.info(
            "fp32 products and convolutions on the GPU in %s (engine.fp32_matmul)",
            {"tf32": "TF32", "ieee": "full fp32"}[mode],
        )


def apply_precision(
    segmentor: nn.Module, compute: torch.dtype, *, heads: torch.dtype = torch.float32, autocast: bool = False
) -> None:
    """Makes `segmentor.backbone` compute in `compute`, and everything beside it in `heads`. Once per model, before deepspeed.initialize.

    compute, heads: torch.bfloat16 or torch.float32. autocast: parameters are fp32 and the caller runs the model under torch.autocast, which then does the
    backbone's casts. A backbone that does not say that it follows its input's dtype (`follows_dtype`) is bf16 under torch.autocast, too. Batch
    norms of a bf16 backbone are computed in fp32, as their moments are, and so are mmcv's compiled operators, which know no bf16. In bf16 heads,
    norms keep fp32 parameters, moments and sums, and class scores (`conv_seg`) are fp32. Batch-norm statistics and other buffers become fp32.
    """
    for name, child in segmentor.named_children():
        if name != "backbone" and heads == torch.bfloat16:
            compute_in_bf16(child, except_for=[head.conv_seg for head in heads_of(segmentor)])
            _compiled_in_fp32(child)
        elif name != "backbone" or compute == torch.float32:
            compute_in_fp32(child)
    buffers_to_fp32(segmentor)
    if compute == torch.bfloat16:
        _compiled_in_fp32(segmentor.backbone)
        if not autocast:
            _norms_with_moments_in_fp32(segmentor.backbone)
            if not getattr(segmentor.backbone, "follows_dtype", False):
                segmentor.backbone.__class__ = _autocasting_class(type(segmentor.backbone))
    entry = torch.float32 if autocast else compute
    segmentor.backbone.register_forward_pre_hook(lambda _, args: tuple(_cast(arg, entry) for arg in args))
    segmentor.backbone.register_forward_hook(lambda _, __, features: _cast(features, heads))


def buffers_to_fp32(segmentor: nn.Module) -> None:
    """Batch-norm statistics and other buffers in fp32, whatever the parameters are in: before values are read into them, which would be rounded."""
    for owner in segmentor.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                owner._buffers[name] = buffer.float()


def compute_in_fp32(module: nn.Module) -> None:
    """Turns every module in `module` that owns parameters into a subclass of its class that computes in fp32."""
    for owner in _owners(module):
        owner.__class__ = _casting_class(type(owner), torch.float32, torch.float32, leaf=_is_leaf(owner))


def compute_in_bf16(module: nn.Module, except_for: Sequence[nn.Module] = ()) -> None:
    """Turns every owner of parameters in `module` into a subclass of its class that computes in bf16; `except_for` in fp32,
    and norms in fp32 with a bf16 result."""
    for owner in _owners(module):
        exact = any(owner is other for other in except_for)
        is_norm = isinstance(owner, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
        owner.__class__ = _casting_class(
            type(owner),
            torch.float32 if exact or is_norm else torch.bfloat16,
            torch.float32 if exact else torch.bfloat16,
            leaf=_is_leaf(owner),
        )


def _norms_with_moments_in_fp32(backbone: nn.Module) -> None:
    """torch's batch norms take weights and moments of one dtype only."""
    for norm in backbone.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.affine:
            norm.__class__ = _casting_class(type(norm), torch.float32, torch.bfloat16, leaf=True)


def _compiled_in_fp32(module: nn.Module) -> None:
    """mmcv's compiled operators have no kernels for bf16: their modules compute in fp32, whole, with a bf16 result."""
    inside: set[nn.Module] = set()
    for operator in list(module.modules()):
        if operator not in inside and any(
            kind.__module__.startswith("mmcv.ops.") for kind in type(operator).__mro__
        ):
            inside.update(operator.modules())
            for child in operator.children():
                compute_in_fp32(child)
            operator.__class__ = _casting_class(type(operator), torch.float32, torch.bfloat16, leaf=True)


def _owners(module: nn.Module) -> list[nn.Module]:
    return [owner for owner in module.modules() if any(True for _ in owner.parameters(recurse=False))]


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


@functools.cache
def _casting_class(
    owner_class: type[nn.Module], compute: torch.dtype, result: torch.dtype, *, leaf: bool
) -> type[nn.Module]:
    """A subclass of `owner_class` whose parameters are read, by itself or by others, as copies in `compute`. They stay as they are in `parameters()`.

    leaf: its forward also sees inputs in `compute`, with autocast off, and returns `result`. Modules with children (nn.MultiheadAttention, a block with a
    scale of its own) leave both to these.
    """

    def __getattr__(
        self: nn.Module, name: str
    ) -> Any:  # torch's way to parameters; under ZeRO-3 they are whole while a forward reads them
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
    """A subclass of `owner_class` whose forward runs under torch.autocast in bf16. Weights are bf16 already, so none need be cached."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(_device_type(args), torch.bfloat16, cache_enabled=False):
            return owner_class.forward(self, *args, **kwargs)

    return derived_class(
        owner_class, {"forward": forward}, word="Autocast", doc=f"{owner_class.__name__}, under autocast."
    )


def _device_type(args: tuple[Any, ...]) -> str:
    """Where a forward computes; "cpu" for tensors without storage, for which there is no autocast."""
    kinds = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)} - {"meta"}
    return next(iter(kinds), "cpu")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`, through lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value
