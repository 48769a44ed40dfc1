"""Attention against its formula, and what happens without flash-attn."""

import importlib.util
import logging

import pytest
import torch

from internseg_ds.models.intern_vit.attention import attention, flash_attention, flash_supports

HAS_FLASH = any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface"))


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """fp64, one head and one sample at a time."""
    out = torch.empty_like(q, dtype=torch.float64)
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            scores = q[sample, :, head].double() @ k[sample, :, head].double().T / q.shape[-1] ** 0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[sample, :, head] = weights @ v[sample, :, head].double()
    return out


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_softmax_of_scaled_products(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 17, 3, 24).to(dtype)
    out = attention(q, k, v, use_flash_attn=False)
    assert out.dtype == dtype and out.shape == (2, 17, 3, 24)
    torch.testing.assert_close(out.double(), formula(q, k, v), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(HAS_FLASH, reason="flash-attn is installed")
def test_a_missing_flash_attn_is_warned_about_once_and_changes_no_number(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    flash_attention.cache_clear()
    with caplog.at_level(logging.WARNING):
        outs = [attention(q, k, v, use_flash_attn=True) for _ in range(3)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "use_flash_attn=True" in caplog.text and "pip install" in caplog.text
    for out in outs:
        assert torch.equal(out, attention(q, k, v, use_flash_attn=False))


def test_flash_attn_is_not_looked_for_unless_asked(caplog: pytest.LogCaptureFixture):
    flash_attention.cache_clear()
    attention(*torch.randn(3, 1, 5, 2, 8), use_flash_attn=False)
    assert flash_attention.cache_info().misses == 0 and not caplog.records


def test_flash_attn_does_not_fit_cpu_tensors():
    assert not flash_supports(torch.zeros(1, 5, 2, 8, dtype=torch.bfloat16))


@pytest.mark.skipif(not (HAS_FLASH and torch.cuda.is_available()), reason="needs a GPU and flash-attn")
def test_flash_attn_and_torch_agree():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 257, 5, 128, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(
        attention(q, k, v, use_flash_attn=True),
        attention(q, k, v, use_flash_attn=False),
        rtol=2e-2,
        atol=2e-2,
    )
