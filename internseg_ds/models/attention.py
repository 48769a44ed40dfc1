"""Scaled-dot-product attention: torch's own kernels by default, flash-attn where it is asked for and can be used.

In and out: tensors (b, n, heads, head_dim) in one dtype. Not causal, no mask, no dropout, scale head_dim ** -0.5. All backends agree within rounding.
"""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


@functools.cache
def flash_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """flash-attn's function, version 3 (on Hopper, which it is written for) before 2, or None when neither can be imported, with one warning per process."""
    try:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
            raise ImportError("flash-attn 3 needs a Hopper GPU")
        from flash_attn_interface import flash_attn_func
    except ImportError:
        try:
            from flash_attn import flash_attn_func  # flash-attn 2
        except ImportError as error:
            log.warning(
                "use_flash_attn=True, but flash-attn cannot be imported (%s); using torch's scaled_dot_product_attention, which gives the same "
                "result. Install it with: pip install --no-build-isolation 'flash-attn>=2.8'",
                error,
            )
            return None
    return flash_attn_func


def attention(q: Tensor, k: Tensor, v: Tensor, *, use_flash_attn: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for each head. q, k, v and the result: (b, n, heads, head_dim).

    use_flash_attn: ask for flash-attn; it takes over where it is installed and has a kernel for these tensors (`fits_flash`).
    """
    if use_flash_attn and (flash := flash_attention()) is not None and fits_flash(q):
        out = flash(q, k, v)
        return (
            out[0] if isinstance(out, tuple) else out
        )  # early versions of flash-attn 3 return (out, logsumexp)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def fits_flash(q: Tensor) -> bool:
    """Whether flash-attn has a kernel for q (b, n, heads, head_dim): fp16 or bf16, heads up to 256 wide, an Ampere or newer GPU."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
