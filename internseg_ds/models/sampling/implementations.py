"""What operators that sample feature maps at fractional positions (DCNv3, deformable attention) share: the
dtype they compute in, and the choice between Triton kernels and PyTorch operations."""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is float64, else float32.

    Never a lower precision, whatever the dtypes of the tensors: a sampling location rounded to bf16 is
    another location.
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def implementation_for(tensors: tuple[Tensor, ...], kernels: str, fallback: ModuleType) -> ModuleType:
    """Choose the module whose `forward` and `backward` compute these tensors (of any shapes).

    kernels: full name of the module of Triton kernels, chosen for tensors on a GPU that compute in fp32,
    where Triton can be imported. fallback: chosen elsewhere, and under `torch.use_deterministic_algorithms`,
    because the kernels' backward pass sums by atomic additions, in no fixed order.
    """
    if (
        tensors[0].is_cuda
        and compute_dtype(*tensors) == torch.float32
        and not torch.are_deterministic_algorithms_enabled()
    ):
        return _triton_module(kernels) or fallback
    return fallback


@functools.cache
def _triton_module(name: str) -> ModuleType | None:
    """Import a module of Triton kernels; None, with one warning per process and module, where Triton (which
    comes with torch's GPU builds) is not installed."""
    if importlib.util.find_spec("triton") is None:
        log.warning(
            "%s is not used, and other code runs slowly on the GPU: Triton cannot be imported. Install it "
            "with: pip install triton",
            name.rpartition(".")[2],
        )
        return None
    return importlib.import_module(name)
