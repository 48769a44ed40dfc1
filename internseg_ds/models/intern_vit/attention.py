"""Scaled-dot-product attention: torch's own kernels by default, flash-attn where it is asked for and can be
used.

In and out: tensors (b, n, heads, head_dim) in one dtype; b images, n tokens. Not causal, no mask, no dropout,
scale head_dim ** -0.5. All implementations agree within rounding.
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
    """Import flash-attn's function (q, k, v) -> out, all (b, n, heads, head_dim): version 3 on Hopper
    GPUs, which it is written for, else version 2. None when neither can be imported, with one warning per
    process."""
    try:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
            raise ImportError("flash-attn 3 needs a Hopper GPU")
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]  # optional
    except ImportError:
        try:
            from flash_attn import flash_attn_func  # flash-attn 2
        except ImportError as error:
            log.warning(
                "use_flash_attn=True, but flash-attn cannot be imported (%s); using torch's "
                "scaled_dot_product_attention, which gives the same "
                "result. Install it with: pip install --no-build-isolation 'flash-attn>=2.8'",
                error,
            )
            return None
    return flash_attn_func


def attention(q: Tensor, k: Tensor, v: Tensor, *, use_flash_attn: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for each head. q, k, v and the result: (b, n, heads, head_dim), one
    dtype.

    use_flash_attn: run flash-attn where it is installed and has a kernel for these tensors
    (`flash_supports`); not in compiled blocks, whose compiler cannot look into the choice.
    """
    wanted = use_flash_attn and not torch.compiler.is_compiling()
    if wanted and (flash := flash_attention()) is not None and flash_supports(q):
        out = flash(q, k, v)
        # early versions of flash-attn 3 return (out, logsumexp)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def flash_supports(q: Tensor) -> bool:
    """Whether flash-attn has a kernel for q: (b, n, heads, head_dim): fp16 or bf16, head_dim up to 256, an
    Ampere or newer GPU."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
