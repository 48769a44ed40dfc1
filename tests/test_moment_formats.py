"""Moments in bf16 and 8 bits: how far a value is from the one that was put in, on average and at most."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from internseg_ds import moment_formats
from internseg_ds.moment_formats import (
    BLOCK,
    CODES,
    EAGER,
    Kernels,
    compiled_kernels,
    from_bytes,
    rounded_to_bf16,
    scales_of,
    to_bytes,
)

N = 1000  # no multiple of a block


def values_of(what: str) -> torch.Tensor:
    """Of seven decades."""
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.randn(N, generator=generator) * torch.logspace(-7, 0, N)[torch.randperm(N, generator=generator)]
    )
    return values if CODES[what].signed else values.abs()


def block_maximum(values: torch.Tensor) -> torch.Tensor:
    """Of each element, the largest absolute value of its block."""
    return torch.cat([block.abs().max().expand_as(block) for block in values.split(BLOCK)])


@pytest.mark.parametrize("what", CODES)
def test_a_value_is_rounded_to_a_neighbour_and_is_itself_on_average(what):
    values, code, noise, times = values_of(what), CODES[what], torch.Generator().manual_seed(1), 2000
    step = 2**-3 * (values.abs() + code.least * block_maximum(values))
    total = torch.zeros(N, dtype=torch.float64)
    for _ in range(times):
        found = from_bytes(*to_bytes(values, code, noise), code)
        assert ((found - values).abs() <= step * 1.001).all()
        total += found
    # the mean of so many coins of +-1 step is that close, all but once in some ten thousand such tests
    assert ((total / times - values).abs() <= 6 * 0.5 * step / times**0.5).all()


@pytest.mark.parametrize("what", CODES)
def test_rounding_what_was_rounded_to_the_nearest_changes_nothing(what):
    code, noise = CODES[what], torch.Generator().manual_seed(1)
    codes, scales = to_bytes(values_of(what), code, noise)
    assert codes.shape == (N,) and scales.shape == (scales_of(N),) == (4,)
    values = from_bytes(codes, scales, code)
    again, scales_again = to_bytes(values, code, None)
    assert torch.equal(from_bytes(again, scales_again, code), values) and torch.equal(scales, scales_again)


def test_a_zero_stays_one_and_a_second_moment_never_becomes_one():
    values = torch.full((N,), 1e-20)
    values[::BLOCK] = 1.0
    for seed in range(20):
        codes, scales = to_bytes(values, CODES["exp_avg_sq"], torch.Generator().manual_seed(seed))
        assert (from_bytes(codes, scales, CODES["exp_avg_sq"]) > 0).all()
    values[1::2] = 0.0
    first = from_bytes(*to_bytes(values, CODES["exp_avg"], torch.Generator()), CODES["exp_avg"])
    assert not first[1::2].any() and torch.equal(first[::BLOCK], values[::BLOCK])
    for what, code in CODES.items():
        assert not from_bytes(*to_bytes(torch.zeros(N), code, torch.Generator()), code).any(), what


def test_bf16_keeps_small_changes_on_average_and_only_then():
    """A change of 1/40 of bf16's step, as a weight of 0.1 has it at a learning rate of 1e-5."""
    values = torch.full((100_000,), 0.1015625)  # is bf16
    changed = values + 2**-11 / 40
    noise = torch.Generator().manual_seed(0)
    assert torch.equal(changed.bfloat16().float(), values)
    rounded = rounded_to_bf16(changed, noise).float()
    assert (rounded - values).mean().item() == pytest.approx(2**-11 / 40, rel=0.1)
    assert torch.equal(
        rounded_to_bf16(-changed, torch.Generator().manual_seed(0)).float(),
        -rounded_to_bf16(changed, torch.Generator().manual_seed(0)).float(),
    )
    assert torch.equal(rounded_to_bf16(values, noise), values.bfloat16())
    assert torch.equal(rounded_to_bf16(changed, None), changed.bfloat16())


def same_by(kernels: Kernels) -> bool:
    """Whether all conversions give what the eager ones give, with the same random numbers, at sizes that end
    inside a block."""

    def converted(values: torch.Tensor, kernels: Kernels) -> list[torch.Tensor]:
        noise = torch.Generator().manual_seed(1)
        found = [rounded_to_bf16(values, noise, kernels)]
        for code in CODES.values():
            moment = values if code.signed else values**2
            codes, scales = to_bytes(moment, code, noise, kernels)
            found += [codes, scales, from_bytes(codes, scales, code, kernels)]
        return found

    return all(
        torch.equal(one, other)
        for size in (3 * BLOCK, 2 * BLOCK + 7)
        for one, other in zip(
            *(converted(values_of("exp_avg")[:size], each) for each in (kernels, EAGER)), strict=True
        )
    )


def test_the_conversions_can_be_traced_and_give_the_same_values():
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        traced.append(graph)
        return graph

    kernels = compiled_kernels(backend)
    assert same_by(kernels)
    # of the rounding to bf16, and of both directions of both moments; decoding sees two kinds of views
    assert 5 <= len(traced) <= 7
    found = len(traced)
    assert same_by(kernels) and len(traced) == found


@pytest.mark.slow
def test_compiled_conversions_give_the_same_values():
    assert same_by(compiled_kernels())


def test_a_conversion_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    said: list[str] = []
    # torch's tracing logs our source lines too, at levels that tests before may have set
    monkeypatch.setattr(moment_formats.log, "warning", lambda text, *values: said.append(text % values))
    assert same_by(compiled_kernels(fails))
    assert len(said) == 5 and all("formats run uncompiled" in line and "no compiler" in line for line in said)
