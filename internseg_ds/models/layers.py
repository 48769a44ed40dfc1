"""Layers that several backbones have: norms and activations by the names that published configs use, linear
layers and drop-path.

None of them chooses a dtype: each computes in that of its input. Parameter names: a norm sits in a small
Sequential together with the permutations that it needs, so its parameters are called `.0.weight`, or
`.1.weight` behind a permutation, as in the published code. Letters: b images, (h, w) a map's size, c
channels.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from internseg_ds.models.norms import TokenLayerNorm

Format = Literal["channels_first", "channels_last"]
"""(b, c, h, w) or (b, h, w, c)."""


def vector_on_device(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Make a vector (len(numbers)) in the dtype and on the device of `like` without waiting for the device.

    `torch.tensor(numbers, device="cuda")` copies from pageable host memory, for which the host waits. Here
    the values are filled in on the device, by one kernel for each run of equal numbers: meant for a few
    numbers, or for many of which most are equal. Sizes of an exported program, which are known when it runs, are
    not compared.
    """
    if any(isinstance(number, torch.SymInt) for number in numbers):
        return torch.cat([like.new_full((1,), number) for number in numbers])
    return torch.cat([like.new_full((len(list(run)),), number) for number, run in groupby(numbers)])


class ToChannelsFirst(nn.Module):
    """A permutation as a module, so that a Sequential can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, h, w, c) -> (b, c, h, w), a view."""
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """A permutation as a module, so that a Sequential can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, c, h, w) -> (b, h, w, c), a view."""
        return x.permute(0, 2, 3, 1)


PERMUTATIONS: dict[Format, type[nn.Module]] = {
    "channels_first": ToChannelsFirst,
    "channels_last": ToChannelsLast,
}


def build_norm(
    channels: int,
    norm_layer: str,
    in_format: Format = "channels_last",
    out_format: Format = "channels_last",
    eps: float = 1e-6,
) -> nn.Sequential:
    """Build LayerNorm over the channels of each position ("LN", with this eps) or batch norm ("BN"), for
    features that come in `in_format` and leave in `out_format`.

    Raises ValueError for another norm_layer.
    """
    norm: nn.Module
    runs_on: Format
    if norm_layer == "LN":
        norm = TokenLayerNorm(channels, eps=eps)
        runs_on = "channels_last"
    elif norm_layer == "BN":
        norm = nn.BatchNorm2d(channels)
        runs_on = "channels_first"
    else:
        raise ValueError(f"norm_layer={norm_layer!r} is neither 'LN' nor 'BN'")
    before = [PERMUTATIONS[runs_on]()] if in_format != runs_on else []
    after = [PERMUTATIONS[out_format]()] if out_format != runs_on else []
    return nn.Sequential(*before, norm, *after)


def build_activation(act_layer: str) -> nn.Module:
    """Build "GELU", "ReLU" or "SiLU". Raises ValueError for another name."""
    activations = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}
    if act_layer not in activations:
        raise ValueError(f"act_layer={act_layer!r} is none of {', '.join(activations)}")
    return activations[act_layer]()


class TruncNormalLinear(nn.Linear):
    """A Linear initialised from a truncated normal of standard deviation 0.02, with zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class XavierLinear(nn.Linear):
    """A Linear initialised from Xavier's uniform distribution, with zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class DropPath(nn.Module):
    """Stochastic depth: zero a residual branch for whole images with probability `drop_prob`, and scale the
    others by 1 / (1 - drop_prob) (Huang et al., "Deep networks with stochastic depth", 2016).

    The Bernoulli draw is exact in every dtype. mmcv's DropPath adds a uniform number to 1 - drop_prob in the
    dtype of x, which in bf16 rounds to another probability. Raises ValueError unless 0 <= drop_prob < 1.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(
                f"a drop-path rate of {drop_prob:g} is not at least 0 and below 1, where no image would be "
                "left (drop_path_rate)"
            )
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, ...) -> the same shape and dtype."""
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=torch.float32, device=x.device)
        mask.bernoulli_(keep)  # 1 for images that keep the branch
        return x * (mask / keep).to(x.dtype)


def without_autocast(like: Tensor) -> torch.autocast:
    """A context in which operations on the device of `like` compute in the dtype of their inputs.

    Autocast does not know the meta device, whose tensors the CPU's setting governs.
    """
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
