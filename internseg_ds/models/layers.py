"""Layers that several backbones have: norms and activations by the names that published configs use, linear layers and residual branches.

A norm sits in a small Sequential together with the permutations that it needs, so its parameters are called `.0.weight`, or `.1.weight` behind a permutation.
None of them chooses a dtype.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from internseg_ds.models.norms import TokenLayerNorm

Format = Literal["channels_first", "channels_last"]


def made_on_device(numbers: Sequence[float], like: Tensor) -> Tensor:
    """`numbers` as a vector of `like`'s dtype on its device, filled there: a copy of them from the host would have to wait for the device.

    A kernel for each run of equal numbers, so for a few of them, or many that are alike.
    """
    return torch.cat([like.new_full((len(list(run)),), number) for number, run in groupby(numbers)])


class ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, c, h, w), a view."""
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h, w, c), a view."""
        return x.permute(0, 2, 3, 1)


def build_norm(
    channels: int,
    norm_layer: str,
    in_format: Format = "channels_last",
    out_format: Format = "channels_last",
    eps: float = 1e-6,
) -> nn.Sequential:
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
    """ "GELU", "ReLU" or "SiLU". Raises ValueError for another name."""
    activations = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}
    if act_layer not in activations:
        raise ValueError(f"act_layer={act_layer!r} is none of {', '.join(activations)}")
    return activations[act_layer]()


class TruncNormalLinear(nn.Linear):
    """A Linear that starts from a truncated normal of standard deviation 0.02 and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DropPath(nn.Module):
    """Drops a residual branch of whole images with probability `drop_prob`, and scales what stays by 1 / (1 - drop_prob)
    (Huang et al., Stochastic Depth, 2016).

    The coin is exact in every dtype; mmcv's adds a uniform number to 1 - drop_prob in the dtype of x, which bf16 rounds to another probability.
    Raises ValueError unless 0 <= drop_prob < 1.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(
                f"a drop-path rate of {drop_prob:g} is not at least 0 and below 1, where no image would be left (drop_path_rate)"
            )
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """x (b, ...) -> the same shape and dtype."""
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=torch.float32, device=x.device).bernoulli_(
            keep
        )
        return x * (kept / keep).to(x.dtype)


def without_autocast(like: Tensor) -> torch.autocast:
    """Inside: products on the device of `like` are computed in the dtype of their factors. Tensors on the meta device know no autocast; the CPU's is taken."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
