"""The parts of a ViT-Adapter: a small convolutional pyramid beside a plain ViT, and the deformable attentions
that exchange features between the two.

In and out: tokens (b, n, c), in the dtype of the input. The pyramid's tokens are those of its maps at 1/8,
1/16 and 1/32 of the image, one map after the other. Every module that owns parameters can draw its initial
values again (`reset_parameters`), so that they may be built in pieces. Letters: b images, (h, w) a size, n
tokens of the ViT, N tokens of some maps (the sum of their h w), c channels. Source: Chen et al., "Vision
Transformer Adapter for Dense Predictions", 2023, section 3, and the parameter names of
OpenGVLab/InternVL-MMDetSeg.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internseg_ds.models.layers import DropPath, TruncNormalLinear, XavierLinear, vector_on_device
from internseg_ds.models.norms import ChannelsFirstLayerNorm, TokenLayerNorm
from internseg_ds.models.sampling.deformable_attention import attend

Shapes = Sequence[tuple[int, int]]
"""(height, width) of each map."""


@dataclass(frozen=True)
class AdapterSettings:
    """What all injectors and extractors of a ViT-Adapter have in common."""

    width: int
    """Channels of a token."""
    heads: int
    """Of the deformable attention."""
    points: int
    """Sampled by each head in each map."""
    ratio: float
    """Width of the attention's values over `width`."""
    hidden: int | None
    """Width of the extractors' MLPs; None for no MLP."""
    drop_path: float
    """Probability, of the MLPs."""
    init_values: float
    """Initial value of the injectors' scale."""


def maps_of(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """tokens: (b, N, c) of maps of these shapes -> the maps, (b, c, h, w) each, views."""
    parts = tokens.split([height * width for height, width in shapes], 1)
    return [part.mT.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


class FanOutConv(nn.Conv2d):
    """A convolution initialised from a normal of variance 2 / fan-out, with zero bias (He et al., 2015)."""

    def reset_parameters(self) -> None:
        fan_out = math.prod(self.kernel_size) * self.out_channels // self.groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class OffsetsLinear(nn.Linear):
    """Initialised so that offsets do not depend on the token: the points of head k lie 1, 2, ... pixels away,
    in the direction k * 360 / heads degrees, as in Deformable DETR. (..., width) -> (..., heads * levels *
    points * 2).
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        self.places = (heads, levels, points)
        super().__init__(width, math.prod(self.places) * 2)

    def reset_parameters(self) -> None:
        heads, levels, points = self.places
        angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # to the edge of a square
        steps = torch.arange(1, points + 1, dtype=torch.float32)
        offsets = (directions[:, None, None] * steps[:, None]).expand(heads, levels, points, 2)
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.bias.copy_(offsets.flatten())


class ZeroLinear(nn.Linear):
    """A Linear initialised with zeros."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class CrossAttention(nn.Module):
    """Deformable attention of query tokens over the maps of a feature pyramid (Zhu et al., "Deformable DETR",
    2021, equation 3).

    levels: number of maps. Raises ValueError where the heads do not divide the width of the values.
    """

    def __init__(self, settings: AdapterSettings, levels: int) -> None:
        super().__init__()
        width, heads, points = settings.width, settings.heads, settings.points
        inner = int(width * settings.ratio)
        if inner % heads:
            raise ValueError(
                f"deform_num_heads={heads} does not divide the {inner} channels of the adapter's attention "
                f"(embed_dim={width} * deform_ratio={settings.ratio:g}); take a divisor, or leave it out"
            )
        self.heads = heads
        self.levels = levels
        self.points = points
        self.sampling_offsets = OffsetsLinear(width, heads, levels, points)
        self.attention_weights = ZeroLinear(width, heads * levels * points)
        self.value_proj = XavierLinear(width, inner)
        self.output_proj = XavierLinear(inner, width)

    def forward(self, query: Tensor, centres: Tensor, features: Tensor, shapes: Shapes) -> Tensor:
        """query: (b, n, c), whose tokens sample around `centres` (n, 2) float32, horizontal first, in [0, 1].
        features: (b, N, c), tokens of maps of these shapes. Returns (b, n, c) in the dtype of the query."""
        per_point = (*query.shape[:2], self.heads, self.levels, self.points)
        value = self.value_proj(features).unflatten(2, (self.heads, -1))
        weights = self.attention_weights(query).unflatten(2, (self.heads, -1)).softmax(-1).view(per_point)
        sizes = vector_on_device(
            [side for height, width in shapes for side in (width, height)], centres
        ).view(-1, 1, 2)
        offsets = self.sampling_offsets(query).view(*per_point, 2) / sizes  # pixels -> [0, 1]
        locations = centres[:, None, None, None] + offsets
        return self.output_proj(attend(value, shapes, locations, weights))


class DepthwiseConv(nn.Module):
    """One 3x3 convolution of each channel, over each map of the pyramid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = FanOutConv(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """x: (b, N, c), tokens of maps of these shapes -> the same shape and dtype."""
        return torch.cat([self.dwconv(features).flatten(2).mT for features in maps_of(x, shapes)], 1)


class ConvMlp(nn.Module):
    """An MLP with a depth-wise convolution behind its first linear layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TruncNormalLinear(width, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.fc2 = TruncNormalLinear(hidden, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """x: (b, N, c), tokens of maps of these shapes -> the same shape and dtype."""
        return self.fc2(self.act(self.dwconv(self.fc1(x), shapes)))


class Injector(nn.Module):
    """x + gamma * attention of the ViT's tokens x over the pyramid."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        width = settings.width
        self.init_values = settings.init_values
        self.query_norm = TokenLayerNorm(width)
        self.feat_norm = TokenLayerNorm(width)
        self.attn = CrossAttention(settings, levels=3)
        self.gamma = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor, centres: Tensor, pyramid: Tensor, shapes: Shapes) -> Tensor:
        """x: (b, n, c), tokens of the ViT with their centres (n, 2) in [0, 1]. pyramid: (b, N, c), tokens
        of maps of these shapes. Returns (b, n, c) in the dtype of x."""
        return x + self.gamma.to(x.dtype) * self.attn(
            self.query_norm(x), centres, self.feat_norm(pyramid), shapes
        )


class Extractor(nn.Module):
    """The pyramid's tokens plus their attention over the ViT's, then plus an MLP with a depth-wise
    convolution."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        width = settings.width
        self.query_norm = TokenLayerNorm(width)
        self.feat_norm = TokenLayerNorm(width)
        self.attn = CrossAttention(settings, levels=1)
        if settings.hidden is not None:
            self.ffn = ConvMlp(width, settings.hidden)
            self.ffn_norm = TokenLayerNorm(width)
        self.drop_path = DropPath(settings.drop_path) if settings.drop_path > 0 else nn.Identity()

    def forward(
        self, pyramid: Tensor, centres: Tensor, x: Tensor, grid: tuple[int, int], shapes: Shapes
    ) -> Tensor:
        """pyramid: (b, N, c), tokens of maps of these shapes, with their centres (N, 2) in [0, 1]. x: (b,
        n, c), tokens of the ViT, whose patches form `grid` (h, w). Returns (b, N, c) in the dtype of the
        pyramid."""
        pyramid = pyramid + self.attn(self.query_norm(pyramid), centres, self.feat_norm(x), [grid])
        if hasattr(self, "ffn"):
            pyramid = pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), shapes))
        return pyramid


class Interaction(nn.Module):
    """What surrounds some blocks of the ViT: an injector before them, one or more extractors behind them."""

    def __init__(self, settings: AdapterSettings, extra_extractors: int) -> None:
        super().__init__()
        self.injector = Injector(settings)
        self.extractor = Extractor(settings)
        self.extra_extractors = nn.ModuleList(Extractor(settings) for _ in range(extra_extractors))

    @property
    def extractors(self) -> list[nn.Module]:
        return [self.extractor, *self.extra_extractors]


class SpatialPrior(nn.Module):
    """Convolutions that make the pyramid of an image that the adapter starts from.

    in_channels: of the image. inner: channels of the stem. width: c. finest: whether the map at 1/4 is made, too.
    """

    def __init__(self, in_channels: int, inner: int, width: int, finest: bool) -> None:
        super().__init__()

        def conv(channels: int, out: int, stride: int) -> list[nn.Module]:
            return [
                FanOutConv(channels, out, 3, stride, 1, bias=False),
                ChannelsFirstLayerNorm(out),
                nn.ReLU(),
            ]

        self.stem = nn.Sequential(
            *conv(in_channels, inner, 2),
            *conv(inner, inner, 1),
            *conv(inner, inner, 1),
            nn.MaxPool2d(3, 2, 1),
        )
        self.conv2 = nn.Sequential(*conv(inner, 2 * inner, 2))
        self.conv3 = nn.Sequential(*conv(2 * inner, 4 * inner, 2))
        self.conv4 = nn.Sequential(*conv(4 * inner, 4 * inner, 2))
        self.fc1 = FanOutConv(inner, width, 1) if finest else None
        self.fc2 = FanOutConv(2 * inner, width, 1)
        self.fc3 = FanOutConv(4 * inner, width, 1)
        self.fc4 = FanOutConv(4 * inner, width, 1)

    def forward(self, image: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """image: (b, 3, h, w) -> maps (b, c, h / 4, w / 4), or None, and at 1/8, 1/16 and 1/32, in the
        same dtype."""
        first = self.stem(image)
        second = self.conv2(first)
        third = self.conv3(second)
        return (
            self.fc1(first) if self.fc1 is not None else None,
            self.fc2(second),
            self.fc3(third),
            self.fc4(self.conv4(third)),
        )
