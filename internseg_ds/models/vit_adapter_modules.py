"""The parts of a ViT-Adapter: a small convolutional pyramid beside a plain ViT, and the attentions by which the two speak to each other.

In and out: tokens (b, n, c). The pyramid's are those of its maps at 1/8, 1/16 and 1/32 of the image, one map after the other. Every module that owns
parameters can draw them anew (`reset_parameters`), so that they may be built in pieces. None of them chooses a dtype.
Source: Chen et al., "Vision Transformer Adapter for Dense Predictions", 2023, section 3, and the parameter names of OpenGVLab/InternVL-MMDetSeg.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from internseg_ds.models.deformable_attention import attend
from internseg_ds.models.layers import DropPath, TruncNormalLinear, made_on_device
from internseg_ds.models.norms import ChannelsFirstLayerNorm, TokenLayerNorm

Shapes = Sequence[tuple[int, int]]
"""(height, width) of each map."""


class FanOutConv(nn.Conv2d):
    """A convolution that starts from a normal of variance 2 / fan-out and zero bias (He et al., 2015)."""

    def reset_parameters(self) -> None:
        fan_out = math.prod(self.kernel_size) * self.out_channels // self.groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class OffsetsLinear(nn.Linear):
    """Starts from offsets that do not depend on the token: the points of head k lie 1, 2, ... pixels away, in the direction k * 360 / heads degrees."""

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
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class XavierLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class CrossAttention(nn.Module):
    """Deformable attention of query tokens over the maps of a feature pyramid (Zhu et al., "Deformable DETR", 2021, equation 3).

    ratio: width of the values over `width`. Raises ValueError where heads do not divide it.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, ratio: float) -> None:
        super().__init__()
        inner = int(width * ratio)
        if inner % heads:
            raise ValueError(
                f"deform_num_heads={heads} does not divide the {inner} channels of the adapter's attention (embed_dim={width} * "
                f"deform_ratio={ratio:g}); take a divisor, or leave it out"
            )
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = OffsetsLinear(width, heads, levels, points)
        self.attention_weights = ZeroLinear(width, heads * levels * points)
        self.value_proj = XavierLinear(width, inner)
        self.output_proj = XavierLinear(inner, width)

    def forward(self, query: Tensor, centres: Tensor, features: Tensor, shapes: Shapes) -> Tensor:
        """query (b, n, c), whose tokens look around `centres` (n, 2), horizontal first, in [0, 1]; features (b, sum of h w, c) -> (b, n, c)."""
        places = (*query.shape[:2], self.heads, self.levels, self.points)
        value = self.value_proj(features).unflatten(2, (self.heads, -1))
        weights = self.attention_weights(query).unflatten(2, (self.heads, -1)).softmax(-1).view(places)
        sizes = made_on_device([side for height, width in shapes for side in (width, height)], centres).view(
            -1, 1, 2
        )
        locations = centres[:, None, None, None] + self.sampling_offsets(query).view(*places, 2) / sizes
        return self.output_proj(attend(value, shapes, locations, weights))


class DepthwiseConv(nn.Module):
    """One 3x3 convolution of each channel, over each map of the pyramid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = FanOutConv(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """x (b, sum of h w, c) -> the same shape."""
        maps = (
            part.mT.unflatten(2, shape)
            for part, shape in zip(
                x.split([height * width for height, width in shapes], 1), shapes, strict=True
            )
        )
        return torch.cat([self.dwconv(features).flatten(2).mT for features in maps], 1)


class ConvMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TruncNormalLinear(width, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.fc2 = TruncNormalLinear(hidden, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x), shapes)))


class Injector(nn.Module):
    """x + gamma * attention of the ViT's tokens x over the pyramid."""

    def __init__(self, width: int, heads: int, points: int, ratio: float, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.query_norm, self.feat_norm = TokenLayerNorm(width), TokenLayerNorm(width)
        self.attn = CrossAttention(width, heads, 3, points, ratio)
        self.gamma = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor, centres: Tensor, pyramid: Tensor, shapes: Shapes) -> Tensor:
        """centres: of the ViT's tokens. shapes: of the pyramid's maps."""
        return x + self.gamma.to(x.dtype) * self.attn(
            self.query_norm(x), centres, self.feat_norm(pyramid), shapes
        )


class Extractor(nn.Module):
    """The pyramid's tokens plus their attention over the ViT's, then plus an MLP with a depthwise convolution."""

    def __init__(
        self, width: int, heads: int, points: int, ratio: float, hidden: int | None, drop_path: float
    ) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = TokenLayerNorm(width), TokenLayerNorm(width)
        self.attn = CrossAttention(width, heads, 1, points, ratio)
        if hidden is not None:
            self.ffn, self.ffn_norm = ConvMlp(width, hidden), TokenLayerNorm(width)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, pyramid: Tensor, centres: Tensor, x: Tensor, grid: tuple[int, int], shapes: Shapes
    ) -> Tensor:
        """centres: of the pyramid's tokens. grid: (h, w) of the ViT's. shapes: of the pyramid's maps."""
        pyramid = pyramid + self.attn(self.query_norm(pyramid), centres, self.feat_norm(x), [grid])
        return (
            pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), shapes))
            if hasattr(self, "ffn")
            else pyramid
        )


class Interaction(nn.Module):
    """What stands before and behind some blocks of the ViT: an injector, and one extractor or three."""

    def __init__(
        self,
        width: int,
        heads: int,
        points: int,
        ratio: float,
        hidden: int | None,
        drop_path: float,
        init_values: float,
        extra: bool,
    ) -> None:
        super().__init__()
        self.injector = Injector(width, heads, points, ratio, init_values)
        self.extractor = Extractor(width, heads, points, ratio, hidden, drop_path)
        self.extra_extractors = nn.ModuleList(
            Extractor(width, heads, points, ratio, hidden, drop_path) for _ in range(2 * extra)
        )

    @property
    def extractors(self) -> list[Extractor]:
        return [self.extractor, *self.extra_extractors]


class SpatialPrior(nn.Module):
    """Convolutions that make of an image the pyramid that the adapter starts from."""

    def __init__(self, inner: int, width: int, finest: bool) -> None:
        super().__init__()

        def conv(channels: int, out: int, stride: int) -> list[nn.Module]:
            return [
                FanOutConv(channels, out, 3, stride, 1, bias=False),
                ChannelsFirstLayerNorm(out),
                nn.ReLU(),
            ]

        self.stem = nn.Sequential(
            *conv(3, inner, 2), *conv(inner, inner, 1), *conv(inner, inner, 1), nn.MaxPool2d(3, 2, 1)
        )
        self.conv2, self.conv3 = (
            nn.Sequential(*conv(inner, 2 * inner, 2)),
            nn.Sequential(*conv(2 * inner, 4 * inner, 2)),
        )
        self.conv4 = nn.Sequential(*conv(4 * inner, 4 * inner, 2))
        self.fc1 = FanOutConv(inner, width, 1) if finest else None
        self.fc2, self.fc3, self.fc4 = (
            FanOutConv(2 * inner, width, 1),
            FanOutConv(4 * inner, width, 1),
            FanOutConv(4 * inner, width, 1),
        )

    def forward(self, image: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """(b, 3, h, w) -> maps (b, c, h / 4, w / 4) or None, and at 1/8, 1/16 and 1/32."""
        first = self.stem(image)
        second = self.conv2(first)
        third = self.conv3(second)
        return (
            self.fc1(first) if self.fc1 is not None else None,
            self.fc2(second),
            self.fc3(third),
            self.fc4(self.conv4(third)),
        )
