"""InternImage for semantic segmentation, in a file that needs torch, transformers and segmentation_parts.py beside it.

A folder with these files, its config.json and its weights is loaded by
`AutoModelForSemanticSegmentation.from_pretrained(FOLDER, trust_remote_code=True)`. Deformable convolutions are sampled
by torch's `grid_sample`. Feature maps are channels last, (b, h, w, c). Letters: b images, (h, w) a size, c channels, g
groups. Source: Wang et al., "InternImage" (2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .segmentation_parts import SegmentationConfig, SegmentationModel

ACTIVATIONS = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


class InternImageConfig(SegmentationConfig):
    """backbone_settings: those of `InternImageSettings`."""

    model_type = "internimage_segmentation"


@dataclass(frozen=True)
class InternImageSettings:
    """channels: of the first level, each later one having twice as many. depths, groups: blocks, and groups of their
    convolutions, per level. norm_layer: "LN" or "BN", of the stem, the downsampling and inside the convolutions.
    post_norm, res_post_norm: the order of a block's norms. post_norm_ids: blocks of the third level that are followed
    by a norm. out_indices: levels whose maps are returned. num_channels: of images."""

    channels: int
    depths: Sequence[int]
    groups: Sequence[int]
    mlp_ratio: float
    act_layer: str
    norm_layer: str
    layer_scale: bool
    offset_scale: float
    post_norm: bool
    dw_kernel_size: int
    res_post_norm: bool
    center_feature_scale: bool
    post_norm_ids: Sequence[int]
    out_indices: Sequence[int]
    num_channels: int = 3


class ToChannelsFirst(nn.Module):
    """(b, h, w, c) -> (b, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """(b, c, h, w) -> (b, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def layer_norm(channels: int) -> nn.Sequential:
    """A LayerNorm of (b, h, w, c)."""
    return nn.Sequential(nn.LayerNorm(channels, eps=1e-6))


def norm_of_map(channels: int, kind: str, channels_last: bool) -> nn.Sequential:
    """A norm of (b, c, h, w). kind: "LN" or "BN". channels_last: its result is (b, h, w, c)."""
    after: list[nn.Module]
    if kind == "LN":
        after = [] if channels_last else [ToChannelsFirst()]
        return nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=1e-6), *after)
    after = [ToChannelsLast()] if channels_last else []
    return nn.Sequential(nn.BatchNorm2d(channels), *after)


class Stem(nn.Module):
    """Two convolutions of stride 2."""

    def __init__(self, settings: InternImageSettings) -> None:
        super().__init__()
        channels, norm = settings.channels, settings.norm_layer
        self.conv1 = nn.Conv2d(settings.num_channels, channels // 2, 3, stride=2, padding=1)
        self.norm1 = norm_of_map(channels // 2, norm, channels_last=False)
        self.act = ACTIVATIONS[settings.act_layer]()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = norm_of_map(channels, norm, channels_last=True)

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, 3, h, w) -> (b, h / 4, w / 4, c)."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(image)))))


class Downsample(nn.Module):
    """A convolution of stride 2 that doubles the channels."""

    def __init__(self, channels: int, norm_layer: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = norm_of_map(2 * channels, norm_layer, channels_last=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, h, w, c) -> (b, h / 2, w / 2, 2 c)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class DeformableConv(nn.Module):
    """DCNv3 with 3 x 3 points: y_g(p) = sum over k of m_gk x_g(p + (p_k + offset_gk) offset_scale)."""

    def __init__(self, channels: int, groups: int, settings: InternImageSettings) -> None:
        super().__init__()
        self.groups, self.offset_scale = groups, settings.offset_scale
        kernel = settings.dw_kernel_size
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
            norm_of_map(channels, settings.norm_layer, channels_last=True),
            ACTIVATIONS[settings.act_layer](),
        )
        self.offset = nn.Linear(channels, groups * 9 * 2)
        self.mask = nn.Linear(channels, groups * 9)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        if settings.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, h, w, c) -> the same shape. Offsets, masks and locations are computed in fp32 at least."""
        projected = self.input_proj(x)
        features = self.dw_conv(x.permute(0, 3, 1, 2))
        compute = torch.promote_types(x.dtype, torch.float32)
        features = features.to(compute)
        offset, mask = (
            F.linear(features, layer.weight.to(compute), layer.bias.to(compute))
            for layer in (self.offset, self.mask)
        )
        mask = mask.unflatten(-1, (self.groups, 9)).softmax(-1)
        y = self.sampled(projected.to(compute), offset.unflatten(-1, (self.groups, 9, 2)), mask).to(x.dtype)
        if hasattr(self, "center_feature_scale_proj_weight"):
            weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            share = F.linear(features, weight.to(compute), bias.to(compute)).sigmoid().to(x.dtype)
            y = torch.lerp(
                y.unflatten(-1, (self.groups, -1)),
                projected.unflatten(-1, (self.groups, -1)),
                share[..., None],
            ).flatten(-2)
        return self.output_proj(y)

    def sampled(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """x: (b, h, w, c). offset: (b, h, w, g, 9, 2), horizontal first, and mask: (b, h, w, g, 9), points in the
        order of a 3 x 3 window's columns. Returns (b, h, w, c)."""
        height, width = x.shape[1:3]
        maps = x.unflatten(-1, (self.groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # (b g, c / g, h, w)
        offset = offset.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        mask = mask.permute(0, 3, 1, 2, 4).flatten(0, 1)
        columns = torch.arange(width, dtype=x.dtype, device=x.device)
        rows = torch.arange(height, dtype=x.dtype, device=x.device)[:, None]
        total = torch.zeros_like(maps)
        for point in range(9):  # one at a time: what is sampled for all would be nine times the map
            column = columns + (point // 3 - 1 + offset[..., point, 0]) * self.offset_scale
            row = rows + (point % 3 - 1 + offset[..., point, 1]) * self.offset_scale
            # grid_sample counts from -1 to 1, from edge to edge of the map
            grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
            total = total + mask[:, None, ..., point] * F.grid_sample(
                maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )
        return total.unflatten(0, (-1, self.groups)).permute(0, 3, 4, 1, 2).flatten(-2)


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, channels: int, hidden: int, act_layer: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = ACTIVATIONS[act_layer]()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + gamma g(x) for f = convolution, then for f = MLP. g(x) is f(norm x), norm(f x) with post_norm, and
    res_post_norm(f(norm x)) with res_post_norm."""

    def __init__(self, channels: int, groups: int, settings: InternImageSettings) -> None:
        super().__init__()
        self.post_norm = settings.post_norm
        self.norm1, self.norm2 = layer_norm(channels), layer_norm(channels)
        self.dcn = DeformableConv(channels, groups, settings)
        self.mlp = Mlp(channels, int(channels * settings.mlp_ratio), settings.act_layer)
        self.res_post_norm1, self.res_post_norm2 = (
            layer_norm(channels) if settings.res_post_norm else nn.Identity() for _ in range(2)
        )
        for name in ("gamma1", "gamma2"):
            gamma = nn.Parameter(torch.ones(channels)) if settings.layer_scale else None
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, h, w, c) -> the same shape."""
        if self.post_norm:
            x = x + _scaled(self.norm1(self.dcn(x)), self.gamma1)
            return x + _scaled(self.norm2(self.mlp(x)), self.gamma2)
        x = x + _scaled(self.res_post_norm1(self.dcn(self.norm1(x))), self.gamma1)
        return x + _scaled(self.res_post_norm2(self.mlp(self.norm2(x))), self.gamma2)


def _scaled(x: Tensor, gamma: Any) -> Tensor:
    return x if gamma is None else x * gamma.to(x.dtype)


class Level(nn.Module):
    """Blocks of one width, a norm, and the downsampling to the next level."""

    def __init__(self, index: int, settings: InternImageSettings) -> None:
        super().__init__()
        channels = settings.channels * 2**index
        self.post_norm_ids = list(settings.post_norm_ids) if index == 2 else []
        self.blocks = nn.ModuleList(
            Block(channels, settings.groups[index], settings) for _ in range(settings.depths[index])
        )
        normed = not settings.post_norm or settings.center_feature_scale
        self.norm = layer_norm(channels) if normed else nn.Identity()
        self.post_norms = nn.ModuleList(layer_norm(channels) for _ in self.post_norm_ids)
        more = index < len(settings.depths) - 1
        self.downsample = Downsample(channels, settings.norm_layer) if more else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, h, w, c) -> the same shape, before the downsampling."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(index)](x)
        return self.norm(x)


class InternImage(nn.Module):
    """Levels of deformable convolutions, each twice as wide and half as large as the one before."""

    def __init__(self, settings: InternImageSettings) -> None:
        super().__init__()
        self.out_indices = list(settings.out_indices)
        self.patch_embed = Stem(settings)
        self.levels = nn.ModuleList(Level(index, settings) for index in range(len(settings.depths)))

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w) -> one map (b, c, h', w') for each of out_indices."""
        x = self.patch_embed(image)
        maps = []
        levels: list[Any] = list(self.levels)[: self.out_indices[-1] + 1]
        for index, level in enumerate(levels):
            x = level(x)
            if index in self.out_indices:
                maps.append(x.permute(0, 3, 1, 2).contiguous())
            if index < self.out_indices[-1]:
                x = level.downsample(x)
        return maps


class InternImageForSemanticSegmentation(SegmentationModel):
    """InternImage and a head."""

    config_class = InternImageConfig
    _no_split_modules = ["Block"]

    def build_backbone(self, **settings: Any) -> nn.Module:
        return InternImage(InternImageSettings(**settings))
