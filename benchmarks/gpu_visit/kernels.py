"""The pieces of a step, each alone, forward and with its backward pass: norms, attention, what lies between
the products of a block, a block, the update."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import seconds_per_call
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_visit.visit import Visit
from internseg_ds.models.intern_vit.attention import flash_attention
from internseg_ds.models.intern_vit.intern_vit_6b import Block, BlockSettings, LayerScale
from internseg_ds.models.norms import RMSNorm, torch_rms_norm


@dataclass(frozen=True)
class Size:
    """images x tokens x width; seconds: for each measurement."""

    images: int = 2
    tokens: int = 1297
    width: int = 3200
    heads: int = 25
    updated: int = 400_000_000
    seconds: float = 0.25


REHEARSED = Size(images=1, tokens=17, width=64, heads=2, updated=4096, seconds=0.01)


def run(visit: Visit) -> None:
    size, device = REHEARSED if visit.rehearse else Size(), visit.device
    _norms(visit, size, device)
    _attention(visit, size, device)
    for how in ("eager", "compiled"):  # compiling takes longer than all the rest
        _pieces(visit, size, device, how)
        _block(visit, size, device, how)
        if how == "eager":
            _update(visit, size, device)


def both(
    visit: Visit,
    name: str,
    settings: Mapping[str, Any],
    make: Callable[[], tuple[Callable[..., Tensor], Sequence[Tensor]]],
    size: Size,
    *,
    flops: float = 0.0,
    units: tuple[float, float] = (0.0, 0.0),
    unit_bytes: float = 0.0,
) -> None:
    """A function of some leaves: milliseconds of its forward pass, and of both passes.

    flops: of the forward pass, of which a backward pass of attention has 2.5 times as many. units: tensors
    that must be read or written, forward and in both passes, of unit_bytes each: what the GB/s are of.
    """

    def measured() -> Mapping[str, Any]:
        function, leaves = make()
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with torch.no_grad():
            forward, _ = seconds_per_call(lambda: function(*leaves), visit.device, seconds=size.seconds)
        grad = torch.randn_like(function(*leaves))
        passes, _ = seconds_per_call(
            lambda: torch.autograd.grad(function(*leaves), leaves, grad), visit.device, seconds=size.seconds
        )
        figures: dict[str, Any] = {"forward_ms": 1e3 * forward, "both_ms": 1e3 * passes}
        if flops:
            figures |= {"forward_tflops": flops / forward / 1e12, "both_tflops": 3.5 * flops / passes / 1e12}
        if unit_bytes:
            figures |= {
                "forward_gbs": units[0] * unit_bytes / forward / 1e9,
                "both_gbs": units[1] * unit_bytes / passes / 1e9,
            }
        return figures

    visit.measure(name, settings, measured)


def _tokens(size: Size, device: torch.device, *, width: int = 1) -> Tensor:
    return torch.randn(size.images * size.tokens, size.width * width, device=device, dtype=torch.bfloat16)


def _norms(visit: Visit, size: Size, device: torch.device) -> None:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

    norm = RMSNorm(size.width).to(device, torch.bfloat16)
    kinds = {
        "ours": lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)),
        "torch rms_norm": lambda x, weight: torch_rms_norm(x, weight, 1e-6),
        "formula": plain,
        "formula, compiled": torch.compile(plain),
    }
    for kind, function in kinds.items():
        both(
            visit,
            "RMSNorm",
            {"kind": kind, "tokens": size.images * size.tokens, "width": size.width},
            lambda function=function: (
                function,
                [_tokens(size, device), torch.ones(size.width, device=device, dtype=torch.bfloat16)],
            ),
            size,
            units=(2, 5),
            unit_bytes=2.0 * size.images * size.tokens * size.width,
        )


def _attention(visit: Visit, size: Size, device: torch.device) -> None:
    width = size.width // size.heads
    flops = 4.0 * size.images * size.heads * size.tokens**2 * width

    def tensors() -> list[Tensor]:
        return [
            torch.randn(size.images, size.tokens, size.heads, width, device=device, dtype=torch.bfloat16)
            for _ in range(3)
        ]

    def by(backend: SDPBackend | None) -> Callable[..., Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                return F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                ).transpose(1, 2)

        return function

    settings = {"images": size.images, "tokens": size.tokens, "heads": size.heads, "head_width": width}
    backends = {
        "torch's choice": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    for name, backend in backends.items():
        if device.type == "cpu" and name in ("cuDNN", "efficient"):
            visit.skip("attention", {"backend": name, **settings}, "there is none on a CPU")
            continue
        both(
            visit,
            "attention",
            {"backend": name, **settings},
            lambda backend=backend: (by(backend), tensors()),
            size,
            flops=flops,
        )
    flash = flash_attention()
    if flash is None or device.type == "cpu":
        visit.skip(
            "attention",
            {"backend": "flash-attn", **settings},
            "flash-attn is not installed" if flash is None else "there is none on a CPU",
        )
        return

    def installed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    both(
        visit,
        "attention",
        {"backend": f"flash-attn ({flash.__module__})", **settings},
        lambda: (installed, tensors()),
        size,
        flops=flops,
    )


def _pieces(visit: Visit, size: Size, device: torch.device, how: str) -> None:
    """Bytes: what one kernel would have to read and write."""

    def qk_norms(qkv: Tensor, weight_q: Tensor, weight_k: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        return torch.cat([torch_rms_norm(q, weight_q, 1e-6), torch_rms_norm(k, weight_k, 1e-6), v], -1)

    scale = LayerScale(size.width, 0.1, False).to(device, torch.bfloat16)
    unit = 2.0 * size.images * size.tokens * size.width

    def scaled(x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return x + torch.func.functional_call(scale, {"gamma": gamma}, (y,))

    def ones(count: int) -> list[Tensor]:
        return [torch.ones(size.width, device=device, dtype=torch.bfloat16) for _ in range(count)]

    pieces: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]], tuple[float, float]]] = {
        "layer scale and residual": (
            scaled,
            lambda: [_tokens(size, device), _tokens(size, device), *ones(1)],
            (3, 3 + 3),
        ),
        "addcmul in its place": (
            lambda x, y, gamma: torch.addcmul(x, y, gamma),
            lambda: [_tokens(size, device), _tokens(size, device), *ones(1)],
            (3, 3 + 3),
        ),
        "GELU of the hidden layer": (F.gelu, lambda: [_tokens(size, device, width=4)], (8, 8 + 12)),
        "norms of q and k, and a copy": (
            qk_norms,
            lambda: [_tokens(size, device, width=3), *ones(2)],
            (6, 6 + 9),
        ),
    }
    for name, (function, leaves, units) in pieces.items():
        both(
            visit,
            name,
            {"how": how, "tokens": size.images * size.tokens, "width": size.width},
            lambda function=function, leaves=leaves: (
                function if how == "eager" else torch.compile(function),
                leaves(),
            ),
            size,
            units=units,
            unit_bytes=unit,
        )


def _block(visit: Visit, size: Size, device: torch.device, how: str) -> None:
    """A whole block; first_call_s holds the seconds of compiling."""
    n = size.images * size.tokens
    forward_flops = 2.0 * n * 12 * size.width**2 + 4.0 * size.images * size.tokens**2 * size.width

    def measured(compiled: bool) -> Mapping[str, Any]:
        settings = BlockSettings(
            width=size.width,
            num_heads=size.heads,
            mlp_ratio=4.0,
            qkv_bias=False,
            qk_normalization=True,
            init_values=0.1,
            force_fp32=False,
            use_flash_attn=False,
            norm_type="rms_norm",
            eps=1e-6,
        )
        block: nn.Module = Block(settings, drop_path=0.0).to(device, torch.bfloat16)
        call = torch.compile(block) if compiled else block
        x = torch.randn(
            size.images, size.tokens, size.width, device=device, dtype=torch.bfloat16, requires_grad=True
        )
        grad = torch.randn_like(x)
        leaves = [x, *block.parameters()]
        began = time.perf_counter()
        torch.autograd.grad(call(x), leaves, grad)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first_s = time.perf_counter() - began
        with torch.no_grad():
            forward, _ = (
                seconds_per_call(lambda: block(x), device, seconds=size.seconds)
                if not compiled
                else (float("nan"), 0.0)
            )
        passes, _ = seconds_per_call(
            lambda: torch.autograd.grad(call(x), leaves, grad), device, seconds=2 * size.seconds
        )
        figures = {
            "both_ms": 1e3 * passes,
            "both_tflops": 3 * forward_flops / passes / 1e12,
            "first_call_s": round(first_s, 2),
        }
        return (
            figures
            if compiled
            else {"forward_ms": 1e3 * forward, "forward_tflops": forward_flops / forward / 1e12, **figures}
        )

    visit.measure(
        "block",
        {"how": how, "images": size.images, "tokens": size.tokens, "width": size.width},
        lambda: measured(how == "compiled"),
    )


def _update(visit: Visit, size: Size, device: torch.device) -> None:
    """torch's fused AdamW on fp32 masters: 16 bytes read and 12 written for each."""

    def measured() -> Mapping[str, Any]:
        parameters = list(_pieces_of(size.updated, device))
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        fastest, _ = seconds_per_call(optimizer.step, device, seconds=size.seconds, rounds=3)
        return {"ms": 1e3 * fastest, "gbs": 28 * size.updated / fastest / 1e9}

    visit.measure("fused AdamW", {"parameters": size.updated}, measured)


def _pieces_of(count: int, device: torch.device) -> Iterator[nn.Parameter]:
    for _ in range(8):
        parameter = nn.Parameter(torch.randn(count // 8, device=device))
        parameter.grad = torch.randn_like(parameter)
        yield parameter
