"""Norms and activations of convolutional backbones by the names that published configs use, for channels-first and channels-last features.

A norm sits in a small Sequential together with the permutations that it needs, so its parameters are called `.0.weight`, or `.1.weight` behind a permutation.
"""

from typing import Literal

from torch import Tensor, nn

from internseg_ds.models.norms import TokenLayerNorm

Format = Literal["channels_first", "channels_last"]


class ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, c, h, w), a view."""
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h, w, c), a view."""
        return x.permute(0, 2, 3, 1)


def build_norm(channels: int, norm_layer: str, in_format: Format = "channels_last", out_format: Format = "channels_last", eps: float = 1e-6) -> nn.Sequential:
    """LayerNorm over the channels of each position ("LN", with this eps) or batch norm ("BN"), between features of these formats.

    Raises ValueError for another name.
    """
    if norm_layer == "LN":
        norm, runs_on = TokenLayerNorm(channels, eps=eps), "channels_last"
    elif norm_layer == "BN":
        norm, runs_on = nn.BatchNorm2d(channels), "channels_first"
    else:
        raise ValueError(f"norm_layer={norm_layer!r} is neither 'LN' nor 'BN'")
    permutation = {"channels_first": ToChannelsFirst, "channels_last": ToChannelsLast}
    before = [permutation[runs_on]()] if in_format != runs_on else []
    after = [permutation[out_format]()] if out_format != runs_on else []
    return nn.Sequential(*before, norm, *after)


def build_activation(act_layer: str) -> nn.Module:
    """"GELU", "ReLU" or "SiLU". Raises ValueError for another name."""
    activations = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}
    if act_layer not in activations:
        raise ValueError(f"act_layer={act_layer!r} is none of {', '.join(activations)}")
    return activations[act_layer]()
