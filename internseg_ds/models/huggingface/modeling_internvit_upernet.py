"""InternViT with UPerNet for semantic segmentation, in one file that needs torch and transformers alone.

A folder with this file, its config.json and its weights is loaded by
`AutoModelForSemanticSegmentation.from_pretrained(FOLDER, trust_remote_code=True)`. In: images (b, 3, h, w) of any
size, normalised as preprocessor_config.json says. Out: logits (b, k, h, w). Letters: b images, (h, w) a size, n
tokens, c channels, k classes. For inference and for further training without dropout and drop-path.
Sources: Chen et al., "InternVL" (2023); Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (2018).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

NORM_EPS = 1e-6
"""Of the pyramid's layer norms."""


class InternViTUperNetConfig(PretrainedConfig):
    """hidden_size: channels of a token. image_size: side of the image whose patch grid the position embedding has.
    norm_type: "rms_norm" or "layer_norm". out_indices: blocks whose patch tokens become the head's maps. with_fpn:
    these are brought to 4x, 2x, 1x and 1/2 of the patch grid. head_indices: of the maps, which the head takes.
    head_channels: of the head's own maps. window_size, window_stride: (vertical, horizontal) pixels of the windows
    of `windowed_logits`; None: whole images. palette: a colour (r, g, b) for each class."""

    model_type = "internvit_upernet"

    def __init__(
        self,
        hidden_size: int = 3200,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 25,
        intermediate_size: int = 12800,
        image_size: int = 224,
        patch_size: int = 14,
        num_channels: int = 3,
        qkv_bias: bool = False,
        qk_normalization: bool = True,
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        layer_scale: bool = True,
        layer_scale_fp32: bool = False,
        out_indices: Sequence[int] = (11, 23, 35, 47),
        with_fpn: bool = True,
        with_final_norm: bool = False,
        head_indices: Sequence[int] = (0, 1, 2, 3),
        head_channels: int = 1536,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = False,
        loss_ignore_index: int = 255,
        window_size: Sequence[int] | None = None,
        window_stride: Sequence[int] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.qkv_bias = qkv_bias
        self.qk_normalization = qk_normalization
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale = layer_scale
        self.layer_scale_fp32 = layer_scale_fp32
        self.out_indices = list(out_indices)
        self.with_fpn = with_fpn
        self.with_final_norm = with_final_norm
        self.head_indices = list(head_indices)
        self.head_channels = head_channels
        self.pool_scales = list(pool_scales)
        self.align_corners = align_corners
        self.loss_ignore_index = loss_ignore_index
        self.window_size = None if window_size is None else list(window_size)
        self.window_stride = None if window_stride is None else list(window_stride)
        self.palette = None if palette is None else [list(colour) for colour in palette]
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def _norm(config: InternViTUperNetConfig) -> nn.Module:
    kind = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}[config.norm_type]
    return kind(config.hidden_size, eps=config.layer_norm_eps)


class LayerScale(nn.Module):
    """x * gamma per channel, computed in fp32 where the configuration says so."""

    def __init__(self, width: int, in_fp32: bool) -> None:
        super().__init__()
        self.in_fp32 = in_fp32
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        compute = torch.float32 if self.in_fp32 else x.dtype
        return (x.to(compute) * self.gamma.to(compute)).to(x.dtype)


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised over all heads together."""

    def __init__(self, config: InternViTUperNetConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.q_norm = RMSNorm(width, eps) if config.qk_normalization else nn.Identity()
        self.k_norm = RMSNorm(width, eps) if config.qk_normalization else nn.Identity()
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

    def __init__(self, config: InternViTUperNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = Attention(config)
        self.mlp = Mlp(width, config.intermediate_size)
        self.ls1, self.ls2 = (
            LayerScale(width, config.layer_scale_fp32) if config.layer_scale else nn.Identity()
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, c) -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w) at each position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HalvingPool(nn.Module):
    """A 2 x 2 max pooling that keeps a side of one element."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = [min(2, side) for side in x.shape[2:]]
        return F.max_pool2d(x, kernel, stride=kernel)


def _pyramid(width: int, with_norm: bool) -> list[nn.Sequential]:
    """The layers that bring four maps to 4x, 2x, 1x and 1/2 of their size."""

    def up() -> nn.Module:
        return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

    stages: list[list[nn.Module]] = [
        [up(), ChannelsFirstLayerNorm(width, eps=NORM_EPS), nn.GELU(), up()],
        [up()],
        [nn.Identity()],
        [HalvingPool()],
    ]
    norms = [[ChannelsFirstLayerNorm(width, eps=NORM_EPS)] if with_norm else [] for _ in stages]
    return [nn.Sequential(*stage, *norm) for stage, norm in zip(stages, norms)]


class PatchEmbed(nn.Module):
    """Splits the image into patches and projects each to a token."""

    def __init__(self, config: InternViTUperNetConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, 3, h, w) -> (b, c, h / patch, w / patch)."""
        return self.proj(image)


class InternViT(nn.Module):
    """The vision transformer, and the pyramid behind it."""

    def __init__(self, config: InternViTUperNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.out_indices, self.with_fpn = config.out_indices, config.with_fpn
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, 1 + (config.image_size // config.patch_size) ** 2, width)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        if config.with_fpn:
            self.up1, self.up2, self.up3, self.up4 = _pyramid(width, config.with_final_norm)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w), sides multiples of a patch -> one map (b, c, h', w') for each of out_indices."""
        patches = self.patch_embed(image)
        grid = (patches.size(2), patches.size(3))
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).mT], dim=1)
        x = tokens + self._position(grid)
        maps = []
        for index, block in enumerate(self.blocks[: self.out_indices[-1] + 1]):
            x = block(x)
            if index in self.out_indices:
                maps.append(x[:, 1:].mT.unflatten(2, grid).contiguous())
        if self.with_fpn:
            maps = [up(features) for up, features in zip((self.up1, self.up2, self.up3, self.up4), maps)]
        return maps

    def _position(self, grid: tuple[int, int]) -> Tensor:
        """(1, 1 + h w, c): the position embedding, resized bicubically to a grid of patches."""
        side = math.isqrt(self.pos_embed.size(1) - 1)
        if grid == (side, side):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).mT.to(self.pos_embed.dtype)], dim=1)


class ConvModule(nn.Module):
    """Convolution that keeps the size of a map, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class UperHead(nn.Module):
    """UPerNet's head: pooled context of the coarsest map, a feature pyramid, a classifier of each position."""

    def __init__(self, config: InternViTUperNetConfig) -> None:
        super().__init__()
        width, channels, maps = config.hidden_size, config.head_channels, len(config.head_indices)
        self.indices, self.align_corners = config.head_indices, config.align_corners
        self.conv_seg = nn.Conv2d(channels, config.num_labels, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(width, channels, 1))
            for scale in config.pool_scales
        )
        self.bottleneck = ConvModule(width + len(config.pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for _ in range(maps - 1))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(maps - 1))
        self.fpn_bottleneck = ConvModule(maps * channels, channels, 3)

    def _resized(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=self.align_corners)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: of the backbone, finest first -> logits (b, k, h', w') of the finest map's size."""
        maps = [maps[index] for index in self.indices]
        last = maps[-1]
        pooled = [self._resized(pool(last), last) for pool in self.psp_modules]
        laterals = [conv(features) for conv, features in zip(self.lateral_convs, maps)]
        laterals.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for index in range(len(laterals) - 1, 0, -1):
            finer = laterals[index - 1]
            laterals[index - 1] = finer + self._resized(laterals[index], finer)
        out = [conv(features) for conv, features in zip(self.fpn_convs, laterals)] + [laterals[-1]]
        out = [out[0]] + [self._resized(features, out[0]) for features in out[1:]]
        return self.conv_seg(self.fpn_bottleneck(torch.cat(out, dim=1)))


class InternViTUperNetForSemanticSegmentation(PreTrainedModel):
    """The segmentor. Backbone and head may have different dtypes; each computes in its own."""

    config_class = InternViTUperNetConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]

    def __init__(self, config: InternViTUperNetConfig) -> None:
        super().__init__(config)
        self.backbone = InternViT(config)
        self.decode_head = UperHead(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """pixel_values: (b, 3, h, w). labels: (b, h, w) int64. Returns logits (b, k, h, w), and with labels their
        cross entropy."""
        height, width = pixel_values.shape[2:]
        patch = self.config.patch_size
        padded = F.pad(pixel_values, (0, -width % patch, 0, -height % patch))
        maps = self.backbone(padded.to(self.backbone.pos_embed.dtype))
        coarse = self.decode_head([features.to(self.decode_head.conv_seg.weight.dtype) for features in maps])
        logits = F.interpolate(
            coarse, padded.shape[2:], mode="bilinear", align_corners=self.config.align_corners
        )[:, :, :height, :width]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, ignore_index=self.config.loss_ignore_index)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def windowed_logits(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (b, 3, h, w) of any size -> (b, k, h, w) float32, the mean over the overlapping windows that
        the training evaluated with."""
        if self.config.window_size is None or self.config.window_stride is None:
            return self(pixel_values).logits.float()
        height, width = pixel_values.shape[2:]
        total = pixel_values.new_zeros(
            len(pixel_values), self.config.num_labels, height, width, dtype=torch.float32
        )
        count = total.new_zeros(height, width)
        size, stride = self.config.window_size, self.config.window_stride
        for rows in _spans(height, size[0], stride[0]):
            for columns in _spans(width, size[1], stride[1]):
                total[:, :, rows, columns] += self(pixel_values[:, :, rows, columns]).logits
                count[rows, columns] += 1
        return total / count


def _spans(side: int, size: int, step: int) -> Iterator[slice]:
    """The windows along one side of an image; the last one is moved inside it."""
    for number in range(max(side - size + step - 1, 0) // step + 1):
        end = min(number * step + size, side)
        yield slice(max(end - size, 0), end)
