"""Normalisation layers of the backbones: RMSNorm and LayerNorm over the channels of tokens or of
channels-last feature maps, and LayerNorm for channels-first feature maps.

In and out: the same shape and dtype; the kernels sum in fp32 inside. Which RMSNorm kernel a machine runs is
measured once and logged. Letters: b images, (h, w) a map's size, c or width the channels.

Every norm casts its weight to the dtype of its input in each forward. The dtype of the weights is not the
norm's choice: an engine of DeepSpeed stores all parameters in one dtype, and a norm whose input has another
(a backbone that computes in bf16 from fp32 weights) needs a copy. A second, stored copy would be another
parameter to partition, to update and to save.
"""

import functools
import importlib
import logging
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, float], Tensor]
"""(x (..., width), weight (width), eps) -> (..., width)"""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean is taken in fp32 (Zhang and
    Sennrich, 2019, equation 4).

    Runs torch's rms_norm, or apex's fused kernel where apex is installed and faster on this GPU (which one is
    logged); in compiled blocks torch's.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> the same shape and dtype."""
        # in a compiled block torch's, which is fused with what stands around it
        kernel = (
            torch_rms_norm
            if torch.compiler.is_compiling()
            else rms_norm_kernel(self.width, x.dtype, x.device)
        )
        # the cast of the result: under autocast norms return fp32
        return kernel(x, self.weight.to(x.dtype), self.eps).to(x.dtype)


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (..., width), weight: (width), of one dtype -> (..., width) in that dtype."""
    return F.rms_norm(x, weight.shape, weight, eps)


def apex_rms_norm() -> Kernel | None:
    """NVIDIA apex's fused kernel, or None where apex or its compiled extension is missing (`apex` of the
    package index is something else)."""
    try:
        # apex can be imported without its extension, and fails at the first call
        importlib.import_module("fused_layer_norm_cuda")
        from apex.normalization.fused_layer_norm import (  # type: ignore[import-not-found]  # optional
            fused_rms_norm_affine,
        )
    except ImportError:
        return None
    return lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)


@functools.cache
def rms_norm_kernel(width: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """Choose torch's kernel, or apex's where it is installed and faster at this width: once per process,
    logged where there is a choice."""
    apex = None
    if device.type == "cuda" and dtype in (torch.float32, torch.float16, torch.bfloat16):
        apex = apex_rms_norm()
    kernels: dict[str, Kernel] = {"torch": torch_rms_norm}
    name, why = "torch", "no other here"
    if apex is not None:
        kernels["apex"] = apex
        name, why = fastest(kernels, width, dtype, device)
    if device.type != "meta":  # where nothing is computed
        log.log(
            logging.DEBUG if apex is None else logging.INFO,
            "RMSNorm of width %d in %s on %s: %s (%s)",
            width,
            str(dtype).removeprefix("torch."),
            device,
            name,
            why,
        )
    return kernels[name]


def fastest(
    kernels: Mapping[str, Kernel], width: int, dtype: torch.dtype, device: torch.device, tokens: int = 2592
) -> tuple[str, str]:
    """Time each kernel on (tokens, width) values of `dtype`; return the name of the fastest, and all times.

    The first kernel stays unless another one is at least 10 % faster. 2,592 tokens are two images of 504 x
    504 pixels. Forward only, without gradients: this runs in the first forward of a training, which may be
    inside activation checkpointing, where a backward pass of its own raises CheckpointError.
    """
    x = torch.ones(tokens, width, dtype=dtype, device=device)
    weight = torch.ones(width, dtype=dtype, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        times_ms = {
            name: _milliseconds(functools.partial(kernel, x, weight, 1e-6), device)
            for name, kernel in kernels.items()
        }
    first = next(iter(times_ms))
    best = min(times_ms, key=times_ms.__getitem__)
    chosen = best if times_ms[best] < 0.9 * times_ms[first] else first
    return chosen, ", ".join(f"{name} {ms:.3f} ms" for name, ms in times_ms.items())


def _milliseconds(run: Callable[[], Tensor], device: torch.device, rounds: int = 5, calls: int = 10) -> float:
    """Time of one call of `run` in ms: the best of `rounds` rounds, after one round that warms up."""
    times_ms = []
    for _ in range(rounds + 1):
        _finish(device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        _finish(device)
        times_ms.append(1e3 * (time.perf_counter() - began) / calls)
    return min(times_ms[1:])


def _finish(device: torch.device) -> None:
    """Waits for the kernels in flight."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TokenLayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> the same shape and dtype."""
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        ).to(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": TokenLayerNorm}
"""Norms of a block by the names that published config.json files use."""


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w) at each position, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, c, h, w) -> the same shape and dtype."""
        pixels = x.permute(0, 2, 3, 1)  # (b, c, h, w) -> (b, h, w, c)
        pixels = F.layer_norm(
            pixels, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        ).to(x.dtype)
        return pixels.permute(0, 3, 1, 2)  # (b, h, w, c) -> (b, c, h, w)
