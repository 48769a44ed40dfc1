"""Precision: which part of a segmentor computes in which dtype, whatever dtype ZeRO stores its parameters in. Modules never decide this themselves.

All parameters of a DeepSpeed engine share one dtype: bf16 (`bf16` ds_configs) or fp32 (`zero3_autocast`). Out of that:

    image --cast--> backbone (bf16, or fp32) --cast to fp32--> heads (fp32) --> losses (fp32)

The casts at the backbone's border are forward hooks. Where a part computes in fp32, its leaves (convolutions, linears, norms ...) upcast their own
weights on use: parameter names, gathering and the stored dtype stay as they are, and gradients flow back into the stored dtype.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from internseg_ds.distributed.ds_config import Precision
from internseg_ds.errors import ConfigError


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices natively. A CPU without AVX-512 falls back to scalar loops there, some 75 times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def backbone_dtype(requested: Literal["auto", "bfloat16", "float32"], device: torch.device, precision: Precision = "bf16") -> torch.dtype:
    """The dtype in which the backbone computes on `device`; "auto" (the config's default) is bf16 where that is native.

    precision: of the ds_config. With "fp32" parameters and no autocast only fp32 can be computed: raises ConfigError where bfloat16 is asked for.
    """
    if precision == "fp32":
        if requested == "bfloat16":
            raise ConfigError("engine.backbone_dtype='bfloat16' needs bf16 weights or autocast; enable bf16 or torch_autocast in the ds_config")
        return torch.float32
    if requested == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return getattr(torch, requested)


def apply_precision(segmentor: nn.Module, compute: torch.dtype, *, autocast: bool = False) -> None:
    """Makes `segmentor.backbone` compute in `compute`, and everything beside it in fp32. Once per model, before deepspeed.initialize.

    compute: torch.bfloat16 or torch.float32. autocast: parameters are fp32 and the caller runs the model under torch.autocast, which then does the
    backbone's casts. Batch-norm statistics and other buffers become fp32.
    """
    for name, child in segmentor.named_children():
        if name != "backbone" or compute == torch.float32:
            compute_in_fp32(child)
    buffers_to_fp32(segmentor)
    entry = torch.float32 if autocast else compute
    segmentor.backbone.register_forward_pre_hook(lambda _, args: tuple(_cast(arg, entry) for arg in args))
    segmentor.backbone.register_forward_hook(lambda _, __, features: _cast(features, torch.float32))


def buffers_to_fp32(segmentor: nn.Module) -> None:
    """Batch-norm statistics and other buffers in fp32, whatever the parameters are in: before values are read into them, which would be rounded."""
    for owner in segmentor.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                owner._buffers[name] = buffer.float()


def compute_in_fp32(module: nn.Module) -> None:
    """Turns every leaf of `module` (a module that owns parameters) into a subclass of its class that computes in fp32."""
    for leaf in module.modules():
        if any(True for _ in leaf.parameters(recurse=False)) and not any(True for _ in leaf.children()):
            leaf.__class__ = _fp32_class(type(leaf))


@functools.cache
def _fp32_class(leaf_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `leaf_class` whose forward sees fp32 inputs and fp32 copies of the parameters, with autocast off."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stored = dict(self._parameters)  # under ZeRO-3 these are whole here: the pre-forward hook has gathered them
        device = next(param.device.type for param in stored.values() if param is not None)
        with torch.autocast(device, enabled=False):
            try:
                self._parameters.update((name, param.float()) for name, param in stored.items() if param is not None)
                return leaf_class.forward(self, *(_cast(arg, torch.float32) for arg in args), **kwargs)
            finally:
                self._parameters.update(stored)

    return type(f"Fp32{leaf_class.__name__}", (leaf_class,), {"forward": forward, "__doc__": f"{leaf_class.__name__}, computed in fp32."})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`, through lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value
