"""InternViT for semantic segmentation, in a file that needs torch, transformers and segmentation_parts.py beside it.

A folder with these files, its config.json and its weights is loaded by
`AutoModelForSemanticSegmentation.from_pretrained(FOLDER, trust_remote_code=True)`. Letters: b images, (h, w) a size, n
tokens, c channels. Source: Chen et al., "InternVL" (2023).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .segmentation_parts import SegmentationConfig, SegmentationModel, pyramid_stages


class InternViTConfig(SegmentationConfig):
    """backbone_settings: those of `InternViTSettings`."""

    model_type = "internvit_segmentation"


@dataclass(frozen=True)
class InternViTSettings:
    """hidden_size: channels of a token. image_size: side of the image whose patch grid the position embedding has.
    norm_type: "rms_norm" or "layer_norm". out_indices: blocks whose patch tokens become maps. with_fpn: these are
    brought to 4x, 2x, 1x and 1/2 of the patch grid."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    qkv_bias: bool
    qk_normalization: bool
    norm_type: str
    layer_norm_eps: float
    out_indices: Sequence[int]
    with_fpn: bool
    with_final_norm: bool
    layer_scale: bool = True
    layer_scale_fp32: bool = False


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def _norm(settings: InternViTSettings) -> nn.Module:
    kind = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}[settings.norm_type]
    return kind(settings.hidden_size, eps=settings.layer_norm_eps)


class LayerScale(nn.Module):
    """x * gamma per channel, computed in fp32 where the settings say so."""

    def __init__(self, width: int, in_fp32: bool) -> None:
        super().__init__()
        self.in_fp32 = in_fp32
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        compute = torch.float32 if self.in_fp32 else x.dtype
        return (x.to(compute) * self.gamma.to(compute)).to(x.dtype)


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised over all heads together."""

    def __init__(self, settings: InternViTSettings) -> None:
        super().__init__()
        width, eps = settings.hidden_size, settings.layer_norm_eps
        self.num_heads = settings.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=settings.qkv_bias)
        self.q_norm = RMSNorm(width, eps) if settings.qk_normalization else nn.Identity()
        self.k_norm = RMSNorm(width, eps) if settings.qk_normalization else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, c) -> the same shape."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_norm(q), self.k_norm(k), v)
        ]
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + ls1(attn(norm1 x)), then the same with the MLP."""

    def __init__(self, settings: InternViTSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.norm1, self.norm2 = _norm(settings), _norm(settings)
        self.attn = Attention(settings)
        self.mlp = Mlp(width, settings.intermediate_size)
        self.ls1, self.ls2 = (
            LayerScale(width, settings.layer_scale_fp32) if settings.layer_scale else nn.Identity()
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, c) -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Splits the image into patches and projects each to a token."""

    def __init__(self, settings: InternViTSettings) -> None:
        super().__init__()
        size = settings.patch_size
        self.proj = nn.Conv2d(settings.num_channels, settings.hidden_size, kernel_size=size, stride=size)

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, 3, h, w) -> (b, c, h / patch, w / patch)."""
        return self.proj(image)


class InternViT(nn.Module):
    """The vision transformer, and the pyramid behind it."""

    def __init__(self, settings: InternViTSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.out_indices, self.with_fpn = settings.out_indices, settings.with_fpn
        self.patch_embed = PatchEmbed(settings)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, 1 + (settings.image_size // settings.patch_size) ** 2, width)
        )
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_hidden_layers))
        if settings.with_fpn:
            self.up1, self.up2, self.up3, self.up4 = pyramid_stages(width, settings.with_final_norm)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w), sides multiples of a patch -> one map (b, c, h', w') for each of out_indices."""
        patches = self.patch_embed(image)
        grid = (patches.size(2), patches.size(3))
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).mT], dim=1)
        x = tokens + resized_position(self.pos_embed, grid)
        maps = []
        for index, block in enumerate(self.blocks[: self.out_indices[-1] + 1]):
            x = block(x)
            if index in self.out_indices:
                maps.append(x[:, 1:].mT.unflatten(2, grid).contiguous())
        if self.with_fpn:
            maps = [up(features) for up, features in zip((self.up1, self.up2, self.up3, self.up4), maps)]
        return maps


def resized_position(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """pos_embed: (1, 1 + s * s, c) -> (1, 1 + h w, c), resized bicubically to a grid (h, w) of patches."""
    side = math.isqrt(pos_embed.size(1) - 1)
    if grid == (side, side):
        return pos_embed
    patches = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).mT.to(pos_embed.dtype)], dim=1)


class InternViTForSemanticSegmentation(SegmentationModel):
    """InternViT and a head."""

    config_class = InternViTConfig
    _no_split_modules = ["Block"]

    def build_backbone(self, **settings: Any) -> nn.Module:
        return InternViT(InternViTSettings(**settings))
