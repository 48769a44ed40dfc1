"""Normalisation layers of the backbones: RMSNorm (InternViT) or LayerNorm (InternImage, too) over the channels of tokens or of channels-last
feature maps, and LayerNorm for channels-first feature maps.

In and out: the same shape and dtype; the kernels sum in fp32 inside. Which RMSNorm kernel a machine runs is measured once and logged.
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
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean is taken in fp32 (Zhang and Sennrich, 2019, equation 4).

    Runs torch's rms_norm, or apex's fused kernel where apex is installed and faster on this GPU (which one is logged).
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape and dtype."""
        kernel = rms_norm_kernel(self.width, x.dtype, x.device)
        return kernel(x, self.weight.to(x.dtype), self.eps).to(
            x.dtype
        )  # the last cast: under autocast norms return fp32


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., width) and weight (width) of one dtype -> (..., width)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def apex_rms_norm() -> Kernel | None:
    """NVIDIA apex's fused kernel, or None where apex or its compiled extension is missing (`apex` of the package index is something else)."""
    try:
        importlib.import_module(
            "fused_layer_norm_cuda"
        )  # apex imports without it and fails at the first call
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError:
        return None
    return lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)


@functools.cache
def rms_norm_kernel(width: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """torch's kernel, or apex's where it is installed and faster at this width: chosen once per process, and logged."""
    kernels: dict[str, Kernel] = {"torch": torch_rms_norm}
    apex = (
        apex_rms_norm()
        if device.type == "cuda" and dtype in (torch.float32, torch.float16, torch.bfloat16)
        else None
    )
    if apex is not None:
        kernels["apex"] = apex
    name, why = fastest(kernels, width, dtype, device) if len(kernels) > 1 else ("torch", "no other here")
    if device.type != "meta":  # where nothing is computed
        log.info(
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
    """The name of the kernel that normalises (tokens, width) values soonest, and the times; the first one, unless another saves a tenth.

    2,592 tokens are two images of 504 x 504. Forward only, without gradients: this runs at the first forward, which may be inside activation
    checkpointing, where a backward pass of its own is a CheckpointError.
    """
    x, weight = (
        torch.ones(tokens, width, dtype=dtype, device=device),
        torch.ones(width, dtype=dtype, device=device),
    )
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        times_ms = {
            name: _milliseconds(functools.partial(kernel, x, weight, 1e-6), device)
            for name, kernel in kernels.items()
        }
    first, best = next(iter(times_ms)), min(times_ms, key=times_ms.__getitem__)
    return best if times_ms[best] < 0.9 * times_ms[first] else first, ", ".join(
        f"{name} {ms:.3f} ms" for name, ms in times_ms.items()
    )


def _milliseconds(run: Callable[[], Tensor], device: torch.device, rounds: int = 5, calls: int = 10) -> float:
    """Time of one call, the best of some rounds after one that warms up."""
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
        """x (..., width) -> the same shape and dtype."""
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        ).to(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": TokenLayerNorm}
"""Norms of a block by the names that published config.json files use. Arguments: width, eps."""


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w) at each position, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, c, h, w) -> the same shape and dtype."""
        pixels = x.permute(0, 2, 3, 1)  # (b, c, h, w) -> (b, h, w, c)
        pixels = F.layer_norm(
            pixels, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        ).to(x.dtype)
        return pixels.permute(0, 3, 1, 2)  # (b, h, w, c) -> (b, c, h, w)
