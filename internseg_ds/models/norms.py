"""Normalisation layers of InternViT: RMSNorm over channels, and LayerNorm for channels-first feature maps."""

import functools
import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)


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
        if x.is_cuda and (apex := apex_rms_norm()) is not None and _apex_is_faster(self.width, x.device, x.dtype):
            return apex(x, self.weight, (self.width,), self.eps)
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


@functools.cache
def apex_rms_norm() -> Callable[[Tensor, Tensor, tuple[int, ...], float], Tensor] | None:
    """NVIDIA apex's fused RMSNorm, or None where it is not installed."""
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError:
        return None
    return fused_rms_norm_affine


@functools.cache
def _apex_is_faster(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Times both kernels, forward and backward, on 2,592 tokens (two images of 504 x 504): once per width, device and dtype."""
    apex = apex_rms_norm()
    x = torch.randn(2592, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(width, device=device, dtype=dtype, requires_grad=True)

    def seconds(norm: Callable[[], Tensor]) -> float:
        with torch.enable_grad():
            for repeats in (3, 20):  # the first round warms up
                torch.cuda.synchronize(device)
                began = time.perf_counter()
                for _ in range(repeats):
                    norm().sum().backward()
                torch.cuda.synchronize(device)
        return time.perf_counter() - began

    apex_s, torch_s = seconds(lambda: apex(x, weight, (width,), 1e-6)), seconds(lambda: F.rms_norm(x, (width,), weight, 1e-6))
    log.info("RMSNorm of width %d, %s: %s (apex / torch time %.2f)", width, dtype, "apex" if apex_s < torch_s else "torch", apex_s / torch_s)
    return apex_s < torch_s


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w) at each position, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, c, h, w) -> the same shape and dtype."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
