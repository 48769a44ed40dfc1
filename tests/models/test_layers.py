"""Norms and activations by the published names."""

import pytest
import torch
from torch import nn

from internseg_ds.models.layers import build_activation, build_norm


@pytest.mark.parametrize(
    ("norm_layer", "in_format", "out_format", "place"),
    [
        ("LN", "channels_last", "channels_last", "0"),
        ("LN", "channels_first", "channels_last", "1"),
        ("LN", "channels_first", "channels_first", "1"),
        ("BN", "channels_first", "channels_first", "0"),
        ("BN", "channels_last", "channels_last", "1"),
        ("BN", "channels_first", "channels_last", "0"),
    ],
)
def test_a_norm_stands_behind_the_permutation_that_it_needs(
    norm_layer: str, in_format: str, out_format: str, place: str
):
    norm = build_norm(5, norm_layer, in_format, out_format).double()
    assert [name for name, _ in norm.named_parameters()] == [f"{place}.weight", f"{place}.bias"]
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)  # channels first
    out = norm(x if in_format == "channels_first" else x.permute(0, 2, 3, 1))
    axes = (1,) if norm_layer == "LN" else (0, 2, 3)
    wanted = (x - x.mean(axes, keepdim=True)) / (
        x.var(axes, unbiased=False, keepdim=True) + (1e-6 if norm_layer == "LN" else 1e-5)
    ).sqrt()
    torch.testing.assert_close(out if out_format == "channels_first" else out.permute(0, 3, 1, 2), wanted)


def test_activations_by_name():
    assert [type(build_activation(name)) for name in ("GELU", "ReLU", "SiLU")] == [nn.GELU, nn.ReLU, nn.SiLU]


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"act_layer='Mish'.*GELU, ReLU, SiLU"):
        build_activation("Mish")
    with pytest.raises(ValueError, match=r"norm_layer='GN'.*'LN'.*'BN'"):
        build_norm(4, "GN")
