"""InternViT with a ViT-Adapter for semantic segmentation, in a file that needs torch, transformers and the files beside
it.

A folder with these files, its config.json and its weights is loaded by
`AutoModelForSemanticSegmentation.from_pretrained(FOLDER, trust_remote_code=True)`. Deformable attention is sampled by
torch's `grid_sample`. Letters: b images, (h, w) a size, n tokens of the ViT, N tokens of the pyramid's three maps, c
channels. Source: Chen et al., "Vision Transformer Adapter for Dense Predictions" (2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_internvit import Block, InternViTSettings, PatchEmbed, resized_position
from .segmentation_parts import (
    ChannelsFirstLayerNorm,
    SegmentationConfig,
    SegmentationModel,
    doubled,
    resized,
)

Shapes = Sequence[tuple[int, int]]
"""(height, width) of each map."""


class VitAdapterConfig(SegmentationConfig):
    """backbone_settings: those of `VitAdapterSettings`."""

    model_type = "vit_adapter_segmentation"


@dataclass(frozen=True)
class VitAdapterSettings:
    """vit: `InternViTSettings`. heads, points, inner: of the deformable attention: heads, points that each samples in
    each map, width of the values. hidden: width of the extractors' MLPs, None for none. parts: of the ViT, the first
    block and that behind the last. extra_extractors: behind the last part. stem: channels of the pyramid's stem.
    finest: whether there is a map at 1/4. final_norm: of each map. add_vit_feature: to each map."""

    vit: Mapping[str, Any]
    heads: int
    points: int
    inner: int
    hidden: int | None
    parts: Sequence[Sequence[int]]
    extra_extractors: int
    stem: int
    finest: bool
    final_norm: bool
    add_vit_feature: bool


def pixel_centres(shapes: Shapes, like: Tensor) -> Tensor:
    """Centres of the pixels of some maps, in [0, 1], horizontal first: (N, 2), in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    centres = []
    for shape in shapes:
        rows, columns = ((torch.arange(side, dtype=dtype, device=like.device) + 0.5) / side for side in shape)
        centres.append(torch.stack([columns.expand(shape), rows[:, None].expand(shape)], -1).flatten(0, 1))
    return torch.cat(centres)


def maps_of(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """tokens: (b, N, c) of maps of these shapes -> the maps, (b, c, h, w) each."""
    parts = tokens.split([height * width for height, width in shapes], 1)
    return [part.mT.unflatten(2, shape) for part, shape in zip(parts, shapes)]


class CrossAttention(nn.Module):
    """Deformable attention of tokens over the maps of a pyramid."""

    def __init__(self, settings: VitAdapterSettings, levels: int) -> None:
        super().__init__()
        width, places = settings.vit["hidden_size"], settings.heads * levels * settings.points
        self.heads, self.levels, self.points = settings.heads, levels, settings.points
        self.sampling_offsets = nn.Linear(width, 2 * places)
        self.attention_weights = nn.Linear(width, places)
        self.value_proj = nn.Linear(width, settings.inner)
        self.output_proj = nn.Linear(settings.inner, width)

    def forward(self, query: Tensor, centres: Tensor, features: Tensor, shapes: Shapes) -> Tensor:
        """query: (b, n, c), whose tokens sample around `centres` (n, 2). features: (b, N, c), tokens of maps of these
        shapes. Returns (b, n, c). Locations and samples are computed in the dtype of the centres."""
        compute = centres.dtype
        per_point = (*query.shape[:2], self.heads, self.levels, self.points)
        value = self.value_proj(features)
        weights = self.attention_weights(query).unflatten(2, (self.heads, -1)).softmax(-1).view(per_point)
        sides = [[width, height] for height, width in shapes]
        sizes = torch.tensor(sides, dtype=compute, device=query.device)[:, None]
        offsets = self.sampling_offsets(query).view(*per_point, 2).to(compute) / sizes
        locations = centres[:, None, None, None] + offsets  # (b, n, heads, levels, points, 2)
        grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
        shares = weights.to(compute).transpose(1, 2).flatten(0, 1)[:, None]
        total = torch.zeros((), dtype=compute, device=query.device)
        for level, pixels in enumerate(maps_of(value.to(compute), shapes)):
            of_heads = pixels.unflatten(1, (self.heads, -1)).flatten(0, 1)
            sampled = F.grid_sample(of_heads, grids[:, :, level], align_corners=False)
            total = total + (sampled * shares[:, :, :, level]).sum(-1)  # (b heads, c / heads, n)
        return self.output_proj(total.unflatten(0, (-1, self.heads)).flatten(1, 2).mT.to(value.dtype))


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel, over each map of the pyramid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return torch.cat([self.dwconv(features).flatten(2).mT for features in maps_of(x, shapes)], 1)


class ConvMlp(nn.Module):
    """An MLP with a depth-wise convolution behind its first linear layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), shapes)))


class Injector(nn.Module):
    """x + gamma * attention of the ViT's tokens x over the pyramid."""

    def __init__(self, settings: VitAdapterSettings) -> None:
        super().__init__()
        width = settings.vit["hidden_size"]
        self.query_norm, self.feat_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CrossAttention(settings, levels=3)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, centres: Tensor, pyramid: Tensor, shapes: Shapes) -> Tensor:
        return x + self.gamma * self.attn(self.query_norm(x), centres, self.feat_norm(pyramid), shapes)


class Extractor(nn.Module):
    """The pyramid's tokens plus their attention over the ViT's, then plus an MLP."""

    def __init__(self, settings: VitAdapterSettings) -> None:
        super().__init__()
        width = settings.vit["hidden_size"]
        self.query_norm, self.feat_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CrossAttention(settings, levels=1)
        if settings.hidden is not None:
            self.ffn, self.ffn_norm = ConvMlp(width, settings.hidden), nn.LayerNorm(width)

    def forward(
        self, pyramid: Tensor, centres: Tensor, x: Tensor, grid: tuple[int, int], shapes: Shapes
    ) -> Tensor:
        pyramid = pyramid + self.attn(self.query_norm(pyramid), centres, self.feat_norm(x), [grid])
        if hasattr(self, "ffn"):
            pyramid = pyramid + self.ffn(self.ffn_norm(pyramid), shapes)
        return pyramid


class Interaction(nn.Module):
    """An injector before some blocks of the ViT, one or more extractors behind them."""

    def __init__(self, settings: VitAdapterSettings, extra_extractors: int) -> None:
        super().__init__()
        self.injector = Injector(settings)
        self.extractor = Extractor(settings)
        self.extra_extractors = nn.ModuleList(Extractor(settings) for _ in range(extra_extractors))


class SpatialPrior(nn.Module):
    """Convolutions that make the pyramid of an image that the adapter starts from."""

    def __init__(self, num_channels: int, inner: int, width: int, finest: bool) -> None:
        super().__init__()

        def conv(channels: int, out: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(channels, out, 3, stride, 1, bias=False),
                ChannelsFirstLayerNorm(out),
                nn.ReLU(),
            ]

        self.stem = nn.Sequential(
            *conv(num_channels, inner, 2),
            *conv(inner, inner, 1),
            *conv(inner, inner, 1),
            nn.MaxPool2d(3, 2, 1),
        )
        self.conv2 = nn.Sequential(*conv(inner, 2 * inner, 2))
        self.conv3 = nn.Sequential(*conv(2 * inner, 4 * inner, 2))
        self.conv4 = nn.Sequential(*conv(4 * inner, 4 * inner, 2))
        self.fc1 = nn.Conv2d(inner, width, 1) if finest else None
        self.fc2 = nn.Conv2d(2 * inner, width, 1)
        self.fc3 = nn.Conv2d(4 * inner, width, 1)
        self.fc4 = nn.Conv2d(4 * inner, width, 1)

    def forward(self, image: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """image: (b, 3, h, w) -> the map at 1/4, or None, and those at 1/8, 1/16 and 1/32."""
        first = self.stem(image)
        second = self.conv2(first)
        third = self.conv3(second)
        finest = None if self.fc1 is None else self.fc1(first)
        return finest, [self.fc2(second), self.fc3(third), self.fc4(self.conv4(third))]


class VitAdapter(nn.Module):
    """InternViT without a class token, and the adapter around its blocks."""

    def __init__(self, settings: VitAdapterSettings) -> None:
        super().__init__()
        vit = InternViTSettings(**settings.vit)
        width, last = vit.hidden_size, len(settings.parts) - 1
        self.parts = [tuple(part) for part in settings.parts]
        self.add_vit_feature = settings.add_vit_feature
        self.patch_embed = PatchEmbed(vit)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (vit.image_size // vit.patch_size) ** 2, width))
        self.blocks = nn.ModuleList(Block(vit) for _ in range(vit.num_hidden_layers))
        self.level_embed = nn.Parameter(torch.zeros(3, width))
        self.spm = SpatialPrior(vit.num_channels, settings.stem, width, settings.finest)
        self.interactions = nn.ModuleList(
            Interaction(settings, settings.extra_extractors if index == last else 0)
            for index in range(len(self.parts))
        )
        self.up = doubled(width) if settings.finest else None
        self.first = 1 if settings.finest else 2
        for number in range(self.first, 5) if settings.final_norm else ():
            setattr(self, f"norm{number}", ChannelsFirstLayerNorm(width))

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w), sides multiples of twice a patch -> maps (b, c, h', w'), finest first."""
        finest, coarse = self.spm(image)
        shapes = [(features.size(2), features.size(3)) for features in coarse]
        levels = [features.flatten(2).mT + level for features, level in zip(coarse, self.level_embed)]
        patches = self.patch_embed(image)
        grid = (patches.size(2), patches.size(3))
        x = patches.flatten(2).mT + resized_position(self.pos_embed, grid)[:, 1:]
        x, pyramid = self._interact(x, torch.cat(levels, 1), grid, shapes)
        maps = maps_of(pyramid, shapes)
        if self.up is not None:
            maps.insert(0, self.up(maps[0]) + finest)
        if self.add_vit_feature:
            vit_map = x.mT.unflatten(2, grid)
            maps = [features + resized(vit_map, features, align_corners=False) for features in maps]
        return [
            getattr(self, f"norm{number}", nn.Identity())(features).contiguous()
            for number, features in enumerate(maps, self.first)
        ]

    def _interact(
        self, x: Tensor, pyramid: Tensor, grid: tuple[int, int], shapes: Shapes
    ) -> tuple[Tensor, Tensor]:
        """x: (b, n, c), tokens of the ViT. pyramid: (b, N, c), tokens of maps of these shapes. Returns both behind
        all blocks."""
        around_tokens, around_pixels = pixel_centres([grid], x), pixel_centres(shapes, x)
        interactions: list[Any] = list(self.interactions)
        for (first, end), interaction in zip(self.parts, interactions):
            x = interaction.injector(x, around_tokens, pyramid, shapes)
            for block in self.blocks[first:end]:
                x = block(x)
            for extractor in (interaction.extractor, *interaction.extra_extractors):
                pyramid = extractor(pyramid, around_pixels, x, grid, shapes)
        return x, pyramid


class VitAdapterForSemanticSegmentation(SegmentationModel):
    """InternViT with a ViT-Adapter, and a head."""

    config_class = VitAdapterConfig
    _no_split_modules = ["Block", "Interaction"]

    def build_backbone(self, **settings: Any) -> nn.Module:
        return VitAdapter(VitAdapterSettings(**settings))
