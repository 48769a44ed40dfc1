"""The parts of InternImage: the stem, blocks of one width in levels, and the downsampling between levels.

In and out: feature maps (b, h, w, c), channels last, in the dtype of the input. Letters: b images, (h, w) the
map's size, c channels. Names, orders of norms and initial values are the published ones
(OpenGVLab/InternImage `segmentation/mmseg_custom/models/backbones/intern_image.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internseg_ds.models.activation_checkpointing import CheckpointingPolicy, run_block
from internseg_ds.models.intern_image.dcnv3 import DCNv3
from internseg_ds.models.layers import DropPath, TruncNormalLinear, build_activation, build_norm


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2."""

    def __init__(self, in_channels: int, channels: int, act_layer: str, norm_layer: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = build_norm(channels // 2, norm_layer, "channels_first", "channels_first")
        self.act = build_activation(act_layer)
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = build_norm(channels, norm_layer, "channels_first", "channels_last")

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, in_channels, h, w) -> (b, ceil(h / 4), ceil(w / 4), c) in the same dtype."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(image)))))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 that doubles the channels."""

    def __init__(self, channels: int, norm_layer: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = build_norm(2 * channels, norm_layer, "channels_first", "channels_last")

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), 2 c) in the same dtype."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Mlp(nn.Module):
    """Two linear layers with an activation between, and dropout after each."""

    def __init__(self, channels: int, hidden: int, act_layer: str, drop: float) -> None:
        super().__init__()
        self.fc1 = TruncNormalLinear(channels, hidden)
        self.act = build_activation(act_layer)
        self.fc2 = TruncNormalLinear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., c) -> the same shape and dtype."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of an InternImage have in common; the names are those of its constructor's
    arguments."""

    mlp_ratio: float
    drop_rate: float
    act_layer: str
    norm_layer: str
    post_norm: bool
    layer_scale: float | None
    offset_scale: float
    dw_kernel_size: int | None
    res_post_norm: bool
    center_feature_scale: bool


class Block(nn.Module):
    """Two residual branches, f = DCNv3 and f = MLP: x + drop_path(gamma * g(x)), without gamma where
    layer_scale is None.

    g(x) is f(norm x) by default, norm(f x) with post_norm, res_post_norm(f(norm x)) with res_post_norm.
    channels: c. groups: of DCNv3. drop_path: probability.
    """

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(self, channels: int, groups: int, drop_path: float, settings: BlockSettings) -> None:
        super().__init__()
        self.post_norm = settings.post_norm
        self.layer_scale = settings.layer_scale
        self.norm1 = build_norm(channels, "LN")
        self.dcn = DCNv3(
            channels,
            kernel_size=3,
            dw_kernel_size=settings.dw_kernel_size,
            stride=1,
            pad=1,
            dilation=1,
            group=groups,
            offset_scale=settings.offset_scale,
            act_layer=settings.act_layer,
            norm_layer=settings.norm_layer,
            center_feature_scale=settings.center_feature_scale,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = build_norm(channels, "LN")
        hidden = int(channels * settings.mlp_ratio)
        self.mlp = Mlp(channels, hidden, settings.act_layer, settings.drop_rate)
        self.res_post_norm1 = build_norm(channels, "LN") if settings.res_post_norm else nn.Identity()
        self.res_post_norm2 = build_norm(channels, "LN") if settings.res_post_norm else nn.Identity()
        for name in ("gamma1", "gamma2"):
            gamma = None if settings.layer_scale is None else nn.Parameter(torch.empty(channels))
            self.register_parameter(name, gamma)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale; the other modules draw their own."""
        if self.layer_scale is None:
            return
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None:
                nn.init.constant_(gamma, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, h, w, c) -> the same shape and dtype."""
        if self.post_norm:
            x = x + self.drop_path(_scaled(self.norm1(self.dcn(x)), self.gamma1))
            return x + self.drop_path(_scaled(self.norm2(self.mlp(x)), self.gamma2))
        x = x + self.drop_path(_scaled(self.res_post_norm1(self.dcn(self.norm1(x))), self.gamma1))
        return x + self.drop_path(_scaled(self.res_post_norm2(self.mlp(self.norm2(x))), self.gamma2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """x: (..., c), gamma: (c) -> the shape and dtype of x."""
    # without the cast, fp32 parameters under autocast would make the residuals fp32
    return x if gamma is None else x * gamma.to(x.dtype)


class Level(nn.Module):
    """Blocks of one width, and the downsampling to the next level.

    channels: c. normed: whether a norm follows the last block. post_norm_ids: blocks that are followed by a
    norm, ascending. downsample: False for the last level.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        channels: int,
        norm_layer: str,
        normed: bool,
        post_norm_ids: Sequence[int],
        downsample: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.post_norm_ids = tuple(post_norm_ids)
        self.norm = build_norm(channels, "LN") if normed else nn.Identity()
        self.post_norms = nn.ModuleList(build_norm(channels, "LN") for _ in post_norm_ids)
        self.downsample = Downsample(channels, norm_layer) if downsample else None

    def forward(self, x: Tensor, first: int, recomputation: CheckpointingPolicy) -> Tensor:
        """x: (b, h, w, c) -> the same shape and dtype, before the downsampling, which the backbone calls.

        first: number of blocks in the levels before, for `run_block`, which counts through the backbone.
        """
        for index, block in enumerate(self.blocks):
            x = run_block(block, x, index=first + index, recomputation=recomputation)
            if index in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(index)](x)
        return self.norm(x)
