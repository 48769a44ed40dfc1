"""The norms against their formulas, and how the RMSNorm kernel is chosen."""

import logging
import time

import pytest
import torch

from internseg_ds.models.norms import (
    ChannelsFirstLayerNorm,
    RMSNorm,
    fastest,
    rms_norm_kernel,
    torch_rms_norm,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)]
)
def test_rms_norm_is_its_formula(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    norm = RMSNorm(48).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 7, 48).to(dtype)
    weight = norm.weight.to(dtype).double()
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    out = norm.to(dtype)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=1e-9)


def test_rms_norm_keeps_its_epsilon_near_zero():
    x = torch.full((1, 16), 1e-4, dtype=torch.float64)
    torch.testing.assert_close(RMSNorm(16).double()(x), x / (1e-8 + 1e-6) ** 0.5)


def test_layer_norm_normalises_the_channels_of_each_pixel():
    torch.manual_seed(0)
    norm = ChannelsFirstLayerNorm(10).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 10, 3, 5, dtype=torch.float64)
    wanted = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    wanted = wanted * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize("norm", [RMSNorm(8), ChannelsFirstLayerNorm(8)])
def test_norms_follow_their_input_and_start_as_identity_scales(norm: torch.nn.Module):
    x = torch.randn(2, 8, 8, 8)
    assert norm(x.bfloat16()).dtype == torch.bfloat16  # with fp32 weights
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(norm.weight, torch.ones(8))
    assert sorted(name for name, _ in norm.named_parameters()) == (
        ["weight"] if isinstance(norm, RMSNorm) else ["bias", "weight"]
    )


def test_the_choice_of_kernel_is_logged_once(caplog: pytest.LogCaptureFixture):
    rms_norm_kernel.cache_clear()
    norm = RMSNorm(24)
    with caplog.at_level(logging.DEBUG, "internseg_ds"):
        for _ in range(3):
            norm(torch.randn(2, 24))
    (message,) = caplog.messages
    for fact in ("RMSNorm", "24", "float32", "cpu", "torch"):
        assert fact in message


def slow_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    time.sleep(0.005)
    return torch_rms_norm(x, weight, eps)


@pytest.mark.parametrize("order", [("torch", "other"), ("other", "torch")])
def test_the_faster_kernel_wins_whatever_the_order(order: tuple[str, str]):
    kernels = {"torch": torch_rms_norm, "other": slow_rms_norm}
    name, why = fastest(
        {key: kernels[key] for key in order}, width=16, dtype=torch.float32, device=CPU, tokens=8
    )
    assert name == "torch" and "torch" in why and " ms" in why and "other" in why


def test_a_tie_goes_to_the_first():
    name, _ = fastest(
        {"first": slow_rms_norm, "second": slow_rms_norm}, width=16, dtype=torch.float32, device=CPU, tokens=8
    )
    assert name == "first"
