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

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

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


def rounded_to_bf16(values: Tensor, noise: torch.Generator | None) -> Tensor:
    """bf16 of fp32 values, a fresh tensor. noise: stochastic rounding; None: to the nearest."""
    if noise is None:
        return values.to(torch.bfloat16)
    return _rounded_bits(values.clone(), 16, noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def to_bytes(values: Tensor, code: ByteCode, noise: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """values: (n,) fp32. Returns codes (n,) uint8 and scales (ceil(n / BLOCK),) fp32. noise: stochastic
    rounding; None: to the nearest, which leaves what `from_bytes` gave as it is."""
    n, blocks = values.numel(), _in_blocks(values)
    magnitudes = blocks.abs() if code.signed else blocks.clone()
    scales = magnitudes.amax(1, keepdim=True)
    magnitudes.div_(scales.clamp(min=torch.finfo(torch.float32).tiny))
    if code.signed:
        # so that 1 stays 1, and the scale comes back as it was; 31 octaves are too many to matter
        magnitudes.mul_(1 - code.least)
    magnitudes.add_(code.least)
    bits = _rounded_bits(magnitudes, 23 - MANTISSA, noise)
    bits.bitwise_right_shift_(23 - MANTISSA).sub_(code.offset)
    if code.signed:
        bits.clamp_(0, 127).add_(blocks < 0, alpha=128)
    else:
        bits.clamp_(1, 255)
    return bits.to(torch.uint8).flatten()[:n], scales.flatten()


def from_bytes(codes: Tensor, scales: Tensor, code: ByteCode) -> Tensor:
    """The (n,) fp32 values of n codes from the beginning of a block on, and of the scales of their blocks."""
    n, blocks = codes.numel(), _in_blocks(codes)
    bits = (blocks & 127 if code.signed else blocks).to(torch.int32)
    values = bits.add_(code.offset).bitwise_left_shift_(23 - MANTISSA).view(torch.float32)
    values.sub_(code.least)
    if code.signed:
        values.div_(1 - code.least).copysign_(blocks.view(torch.int8))
    return values.mul_(scales[:, None]).flatten()[:n]


def _in_blocks(values: Tensor) -> Tensor:
    """(blocks, BLOCK): values (n,), with zeros behind them where n is no multiple."""
    rest = -values.numel() % BLOCK
    return (nn.functional.pad(values, (0, rest)) if rest else values).view(-1, BLOCK)


def _rounded_bits(values: Tensor, dropped: int, noise: torch.Generator | None) -> Tensor:
    """The bits (int32) of fp32 values >= 0, or of any sign by their absolute value, so that cutting off the
    last `dropped` of them rounds. Changes `values`."""
    bits = values.view(torch.int32)
    if noise is None:
        return bits.add_(1 << (dropped - 1))
    return bits.add_(torch.empty_like(bits).random_(0, 1 << dropped, generator=noise))
