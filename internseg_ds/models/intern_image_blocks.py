"""What an InternImage is made of: the stem, blocks of one width in levels, and the way down from one level to the next.

In and out: feature maps (b, h, w, c), channels last, in the dtype of the input. Names, orders of norms and initial values are the published ones
(OpenGVLab/InternImage `segmentation/mmseg_custom/models/backbones/intern_image.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from internseg_ds.models.dcnv3 import DCNv3
from internseg_ds.models.layers import DropPath, TruncNormalLinear, build_activation, build_norm
from internseg_ds.models.recomputation import Recomputation, run_block


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2."""

    def __init__(self, channels: int, act_layer: str, norm_layer: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = build_norm(channels // 2, norm_layer, "channels_first", "channels_first")
        self.act = build_activation(act_layer)
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = build_norm(channels, norm_layer, "channels_first", "channels_last")

    def forward(self, image: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, ceil(h / 4), ceil(w / 4), c)."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(image)))))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 that doubles the channels."""

    def __init__(self, channels: int, norm_layer: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = build_norm(2 * channels, norm_layer, "channels_first", "channels_last")

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), 2 c)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int, act_layer: str, drop: float) -> None:
        super().__init__()
        self.fc1 = TruncNormalLinear(channels, hidden)
        self.act = build_activation(act_layer)
        self.fc2 = TruncNormalLinear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Two residual branches, f = DCNv3 and f = MLP: x + drop_path(gamma * g(x)), without gamma where layer_scale is None.

    g(x) is f(norm x) by default, norm(f x) with post_norm, res_post_norm(f(norm x)) with res_post_norm.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        act_layer: str,
        norm_layer: str,
        post_norm: bool,
        layer_scale: float | None,
        offset_scale: float,
        dw_kernel_size: int | None,
        res_post_norm: bool,
        center_feature_scale: bool,
    ) -> None:
        super().__init__()
        self.post_norm, self.layer_scale = post_norm, layer_scale
        self.norm1 = build_norm(channels, "LN")
        self.dcn = DCNv3(
            channels,
            kernel_size=3,
            dw_kernel_size=dw_kernel_size,
            stride=1,
            pad=1,
            dilation=1,
            group=groups,
            offset_scale=offset_scale,
            act_layer=act_layer,
            norm_layer=norm_layer,
            center_feature_scale=center_feature_scale,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = build_norm(channels, "LN")
        self.mlp = Mlp(channels, int(channels * mlp_ratio), act_layer, drop)
        self.res_post_norm1 = build_norm(channels, "LN") if res_post_norm else nn.Identity()
        self.res_post_norm2 = build_norm(channels, "LN") if res_post_norm else nn.Identity()
        self.register_parameter(
            "gamma1", None if layer_scale is None else nn.Parameter(torch.empty(channels))
        )
        self.register_parameter(
            "gamma2", None if layer_scale is None else nn.Parameter(torch.empty(channels))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the layer scale; the other modules draw their own."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None:
                nn.init.constant_(gamma, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, h, w, c) -> the same shape and dtype."""
        if self.post_norm:
            x = x + self.drop_path(_scaled(self.norm1(self.dcn(x)), self.gamma1))
            return x + self.drop_path(_scaled(self.norm2(self.mlp(x)), self.gamma2))
        x = x + self.drop_path(_scaled(self.res_post_norm1(self.dcn(self.norm1(x))), self.gamma1))
        return x + self.drop_path(_scaled(self.res_post_norm2(self.mlp(self.norm2(x))), self.gamma2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return (
        x if gamma is None else x * gamma.to(x.dtype)
    )  # without the cast, fp32 parameters under autocast would make the residuals fp32


class Level(nn.Module):
    """Blocks of one width, and the way down to the next level.

    normed: whether a norm follows the blocks. post_norm_ids: blocks after which a norm stands, ascending. downsample: False for the last level.
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

    def forward(self, x: Tensor, first: int, recomputation: Recomputation) -> Tensor:
        """x (b, h, w, c) -> the same shape, before the downsampling. first: how many blocks of the backbone come before this level's."""
        for index, block in enumerate(self.blocks):
            x = run_block(block, x, index=first + index, recomputation=recomputation)
            if index in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(index)](x)
        return self.norm(x)
