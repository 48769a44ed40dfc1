"""In how many bits an optimizer's moments are held, and rounding that loses no small change.

A second moment changes by 0.1 % in a step, and a weight by less; bf16 has steps of 0.4 to 0.8 %, and 8 bits
of 6 to 13 %. Rounded to the nearest, most changes would be lost. Here a value is rounded up or down at
random, so that the expected result is the value itself (stochastic rounding; Gupta et al., "Deep Learning
with Limited Numerical Precision", 2015).

8 bits: the elements of a block (`BLOCK`) share an fp32 scale, the largest absolute value among them (as in
Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022). An element divided by it, plus a least
value, is the top of an fp32 number: its exponent and 3 bits of its mantissa. A first moment has a bit for its
sign, and 15 octaves below the largest value of its block; a second moment is never negative and has 31. The
least value makes zero exact, and steps near zero equal. A second moment that is not zero is never rounded to
zero: the update divides by it.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from internseg_ds.torch_internals import compilation_error

log = logging.getLogger(__name__)

OptimizerStates = Literal["fp32", "bf16", "8bit"]
"""In what the optimizer holds its moments."""
BLOCK = 256
"""Elements of a moment in 8 bits that share a scale."""
SCALE = "_scale"
"""Behind the name of a moment in 8 bits: its scales."""
BYTES_PER_MOMENT: dict[OptimizerStates, float] = {"fp32": 4, "bf16": 2, "8bit": 1 + 4 / BLOCK}
MANTISSA = 3
"""Bits of the mantissa in 8 bits."""


@dataclass(frozen=True)
class ByteCode:
    """How an element in [-1, 1] is 8 bits. signed: whether it can be negative. octaves: between 1 and the
    least value."""

    signed: bool
    octaves: int

    @property
    def least(self) -> float:
        return 2.0**-self.octaves

    @property
    def offset(self) -> int:
        """Exponent and `MANTISSA` bits of the least value in fp32 (whose exponents count from -127)."""
        return (127 - self.octaves) << MANTISSA


CODES = {"exp_avg": ByteCode(True, 15), "exp_avg_sq": ByteCode(False, 31)}
"""Of Adam's moments, by torch's names."""


def scales_of(elements: int) -> int:
    """How many scales so many elements in 8 bits have."""
    return math.ceil(elements / BLOCK)


def _encoded(blocks: Tensor, added: Tensor | int, code: ByteCode) -> tuple[Tensor, Tensor]:
    """blocks: (b, BLOCK) fp32. added: to the bits below those that are kept, int32."""
    magnitudes = blocks.abs() if code.signed else blocks.clone()
    scales = magnitudes.amax(1, keepdim=True)
    magnitudes.div_(scales.clamp(min=torch.finfo(torch.float32).tiny))
    if code.signed:
        # so that 1 stays 1, and the scale comes back as it was; 31 octaves are too many to matter
        magnitudes.mul_(1 - code.least)
    magnitudes.add_(code.least)
    bits = magnitudes.view(torch.int32).add_(added)
    bits.bitwise_right_shift_(23 - MANTISSA).sub_(code.offset)
    if code.signed:
        bits.clamp_(0, 127).add_(blocks < 0, alpha=128)
    else:
        bits.clamp_(1, 255)
    return bits.to(torch.uint8), scales


def _decoded(codes: Tensor, scales: Tensor, code: ByteCode) -> Tensor:
    """codes: (b, BLOCK). scales: (b,). Returns (b, BLOCK) fp32."""
    bits = (codes & 127 if code.signed else codes).to(torch.int32)
    values = bits.add_(code.offset).bitwise_left_shift_(23 - MANTISSA).view(torch.float32)
    values.sub_(code.least)
    if code.signed:
        values.div_(1 - code.least).copysign_(codes.view(torch.int8))
    return values.mul_(scales[:, None])


def _cut_to_bf16(values: Tensor, added: Tensor) -> Tensor:
    """values: fp32 of any sign, rounded by their absolute value. added: to the last 16 bits, int32."""
    bits = values.clone().view(torch.int32).add_(added)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


@dataclass(frozen=True)
class Kernels:
    """The elementwise work of these formats, without its random numbers: `_encoded`, `_decoded`,
    `_cut_to_bf16`, or functions that give the same."""

    encode: Callable[[Tensor, Tensor | int, ByteCode], tuple[Tensor, Tensor]] = _encoded
    decode: Callable[[Tensor, Tensor, ByteCode], Tensor] = _decoded
    cut: Callable[[Tensor, Tensor], Tensor] = _cut_to_bf16


EAGER = Kernels()


def compiled_kernels(backend: str | Callable[..., Any] = "inductor") -> Kernels:
    """By torch.compile, one pass over memory each, for tensors of all sizes; nothing is compiled before the
    first call. A function that cannot be compiled runs as it is, and the log says so in one line. backend:
    torch.compile's."""
    encode, decode = (
        {code: _compiled(function, backend) for code in CODES.values()} for function in (_encoded, _decoded)
    )
    return Kernels(
        lambda blocks, added, code: encode[code](blocks, added, code),
        lambda codes, scales, code: decode[code](codes, scales, code),
        _compiled(_cut_to_bf16, backend),
    )


def _compiled(function: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    # the compiler counts graphs against a limit by the code object, so each has its own: chunks of a tensor are
    # views of several kinds, each a graph
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    run = torch.compile(own, fullgraph=True, dynamic=True, backend=backend)
    failed = False

    def call(*args: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return run(*args)
            except compilation_error() as error:
                failed = True
                log.warning(
                    "engine.compile: the optimizer's formats run uncompiled (%s: %s)",
                    type(error).__name__,
                    " ".join(str(error).split())[:300],
                )
        return function(*args)

    return call


def rounded_to_bf16(values: Tensor, noise: torch.Generator | None, kernels: Kernels = EAGER) -> Tensor:
    """bf16 of fp32 values, a fresh tensor. noise: stochastic rounding; None: to the nearest."""
    if noise is None:
        return values.to(torch.bfloat16)
    return kernels.cut(values, _random_bits(values, 16, noise))


def to_bytes(
    values: Tensor, code: ByteCode, noise: torch.Generator | None, kernels: Kernels = EAGER
) -> tuple[Tensor, Tensor]:
    """values: (n,) fp32. Returns codes (n,) uint8 and scales (ceil(n / BLOCK),) fp32. noise: stochastic
    rounding; None: to the nearest, which leaves what `from_bytes` gave as it is."""
    blocks = _in_blocks(values)
    dropped = 23 - MANTISSA
    added = 1 << (dropped - 1) if noise is None else _random_bits(blocks, dropped, noise)
    codes, scales = kernels.encode(blocks, added, code)
    return codes.flatten()[: values.numel()], scales.flatten()


def from_bytes(codes: Tensor, scales: Tensor, code: ByteCode, kernels: Kernels = EAGER) -> Tensor:
    """The (n,) fp32 values of n codes from the beginning of a block on, and of the scales of their blocks."""
    return kernels.decode(_in_blocks(codes), scales, code).flatten()[: codes.numel()]


def _random_bits(like: Tensor, count: int, noise: torch.Generator) -> Tensor:
    """int32, below 2 to the power of `count`."""
    return torch.empty_like(like, dtype=torch.int32).random_(0, 1 << count, generator=noise)


def _in_blocks(values: Tensor) -> Tensor:
    """(blocks, BLOCK): values (n,), with zeros behind them where n is no multiple."""
    rest = -values.numel() % BLOCK
    return (nn.functional.pad(values, (0, rest)) if rest else values).view(-1, BLOCK)
