"""What operators that sample maps at fractional places (DCNv3, deformable attention) share: the dtype they compute in, and which code computes them."""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where one of the tensors is, else fp32: never less, since a location that bf16 rounds is another location."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def implementation_for(tensors: tuple[Tensor, ...], kernels: str, otherwise: ModuleType) -> ModuleType:
    """The module of this package that is called `kernels`, of Triton kernels, for tensors on GPUs that compute in fp32, where Triton can be imported;
    `otherwise` elsewhere, and under `torch.use_deterministic_algorithms`, since the kernels' backward pass adds in no certain order."""
    fits = (
        tensors[0].is_cuda
        and compute_dtype(*tensors) == torch.float32
        and not torch.are_deterministic_algorithms_enabled()
    )
    return (_triton_module(kernels) if fits else None) or otherwise


@functools.cache
def _triton_module(name: str) -> ModuleType | None:
    """None where Triton, which comes with torch's builds for GPUs, is not installed, with one warning per process and module."""
    if importlib.util.find_spec("triton") is None:
        log.warning(
            "%s is not used, and other code runs slowly on the GPU: Triton cannot be imported. Install it with: pip install triton",
            name,
        )
        return None
    return importlib.import_module(f"internseg_ds.models.{name}")
