"""What the segmentors of folders like this one have in common: configuration, heads, feature pyramids, and the pass
from an image to logits. It needs torch and transformers alone; a file modeling_*.py beside it has the backbone.

In: images (b, 3, h, w) of any size, normalised as preprocessor_config.json says. Out: logits (b, k, h, w). Letters: b
images, (h, w) a size, c channels, k classes. For inference and for further training without dropout and drop-path.
Sources: Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (2018); Long et al., "Fully Convolutional
Networks" (2015); Li et al., "Exploring plain Vision Transformer backbones for object detection" (2022).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput


class SegmentationConfig(PretrainedConfig):
    """backbone_settings: arguments of the backbone. pyramid: of a feature pyramid between backbone and head, or None.
    head: kind ("UPerHead", "FCNHead"), in_index, in_channels, channels and what else that kind has. patch_size:
    (vertical, horizontal) pixels; sides of images are padded to multiples of them. window_size, window_stride:
    (vertical, horizontal) pixels of the windows of `windowed_logits`; None: whole images. palette: a colour (r, g, b)
    for each class."""

    model_type = "segmentation_with_code"

    def __init__(
        self,
        backbone_settings: Mapping[str, Any] | None = None,
        pyramid: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        patch_size: Sequence[int] = (1, 1),
        align_corners: bool = False,
        loss_ignore_index: int = 255,
        window_size: Sequence[int] | None = None,
        window_stride: Sequence[int] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_settings = dict(backbone_settings or {})
        self.pyramid = None if pyramid is None else dict(pyramid)
        self.head = dict(head or {})
        self.patch_size = list(patch_size)
        self.align_corners = align_corners
        self.loss_ignore_index = loss_ignore_index
        self.window_size = None if window_size is None else list(window_size)
        self.window_stride = None if window_stride is None else list(window_stride)
        self.palette = None if palette is None else [list(colour) for colour in palette]
        super().__init__(**kwargs)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w) at each position, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HalvingPool(nn.Module):
    """A 2 x 2 max pooling that keeps a side of one element."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = [min(2, side) for side in x.shape[2:]]
        return F.max_pool2d(x, kernel, stride=kernel)


def doubled(channels: int, out: int | None = None) -> nn.Module:
    """A transposed convolution to twice the size."""
    return nn.ConvTranspose2d(channels, out or channels, kernel_size=2, stride=2)


def pyramid_stages(width: int, with_norm: bool) -> list[nn.Sequential]:
    """The layers that bring four maps to 4x, 2x, 1x and 1/2 of their size."""
    stages: list[list[nn.Module]] = [
        [doubled(width), ChannelsFirstLayerNorm(width), nn.GELU(), doubled(width)],
        [doubled(width)],
        [nn.Identity()],
        [HalvingPool()],
    ]
    return [
        nn.Sequential(*stage, *([ChannelsFirstLayerNorm(width)] if with_norm else [])) for stage in stages
    ]


class ViTFeaturePyramid(nn.Module):
    """Four maps of one width, each brought to a scale of its own."""

    def __init__(self, width: int, with_norm: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(pyramid_stages(width, with_norm))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [stage(features) for stage, features in zip(self.stages, maps)]


class SimpleFeaturePyramid(nn.Module):
    """The last map at four scales."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        scales: list[tuple[list[nn.Module], int]] = [
            (
                [doubled(width, half), ChannelsFirstLayerNorm(half), nn.GELU(), doubled(half, quarter)],
                quarter,
            ),
            ([doubled(width, half)], half),
            ([], width),
            ([HalvingPool()], width),
        ]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                ChannelsFirstLayerNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelsFirstLayerNorm(out_channels),
            )
            for layers, channels in scales
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [stage(maps[-1]) for stage in self.stages]


def build_pyramid(settings: Mapping[str, Any] | None) -> nn.Module | None:
    """settings: kind, the name of a class of this file, and its arguments; None: no pyramid."""
    if settings is None:
        return None
    kinds = {kind.__name__: kind for kind in (ViTFeaturePyramid, SimpleFeaturePyramid)}
    return kinds[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})


class ConvModule(nn.Module):
    """Convolution that keeps the size of a map, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class UPerHead(nn.Module):
    """UPerNet's head: pooled context of the coarsest map, a feature pyramid, a classifier of each position."""

    def __init__(
        self,
        classes: int,
        align_corners: bool,
        in_index: Sequence[int],
        in_channels: Sequence[int],
        channels: int,
        pool_scales: Sequence[int],
    ) -> None:
        super().__init__()
        last, finer = in_channels[-1], in_channels[:-1]
        self.in_index, self.align_corners = list(in_index), align_corners
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(last, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(last + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvModule(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: of the backbone, finest first -> logits (b, k, h', w') of the finest map's size."""
        maps = [maps[index] for index in self.in_index]
        last = maps[-1]
        pooled = [resized(pool(last), last, self.align_corners) for pool in self.psp_modules]
        laterals = [conv(features) for conv, features in zip(self.lateral_convs, maps)]
        laterals.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for index in range(len(laterals) - 1, 0, -1):
            finer = laterals[index - 1]
            laterals[index - 1] = finer + resized(laterals[index], finer, self.align_corners)
        out = [conv(features) for conv, features in zip(self.fpn_convs, laterals)] + [laterals[-1]]
        out = [out[0]] + [resized(features, out[0], self.align_corners) for features in out[1:]]
        return self.conv_seg(self.fpn_bottleneck(torch.cat(out, dim=1)))


class FCNHead(nn.Module):
    """Convolutions, a batch norm, a classifier of each position; without convolutions a linear probe."""

    def __init__(
        self,
        classes: int,
        align_corners: bool,
        in_index: Sequence[int],
        in_channels: int,
        channels: int,
        num_convs: int,
        kernel_size: int,
        dilation: int,
        concat_input: bool,
        with_norm: bool,
    ) -> None:
        super().__init__()
        self.in_index, self.align_corners = list(in_index), align_corners
        widths = [in_channels, *[channels] * (num_convs - 1)][:num_convs]
        convs = [ConvModule(width, channels, kernel_size, dilation) for width in widths]
        self.convs = nn.Sequential(*convs) if convs else nn.Identity()
        self.conv_cat = ConvModule(in_channels + channels, channels, kernel_size) if concat_input else None
        self.norm = nn.BatchNorm2d(channels) if with_norm else nn.Identity()
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: of the backbone, those of in_index concatenated at the first one's size -> logits (b, k, h', w')."""
        first, *others = (maps[index] for index in self.in_index)
        x = torch.cat([first, *(resized(each, first, self.align_corners) for each in others)], dim=1)
        features = self.convs(x)
        if self.conv_cat is not None:
            features = self.conv_cat(torch.cat([x, features], dim=1))
        return self.conv_seg(self.norm(features))


def resized(x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    """x (b, c, h, w) bilinearly to the size of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)


class WindowedLogits:
    """Logits of images of any size, for models whose configuration has window_size and window_stride."""

    config: Any

    def whole_logits(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (b, 3, h, w) -> (b, k, h, w) float32."""
        raise NotImplementedError

    @torch.no_grad()
    def windowed_logits(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (b, 3, h, w) of any size -> (b, k, h, w) float32, the mean over the overlapping windows that
        the training evaluated with."""
        if self.config.window_size is None or self.config.window_stride is None:
            return self.whole_logits(pixel_values)
        height, width = pixel_values.shape[2:]
        total = pixel_values.new_zeros(
            len(pixel_values), self.config.num_labels, height, width, dtype=torch.float32
        )
        count = total.new_zeros(height, width)
        size, stride = self.config.window_size, self.config.window_stride
        for rows in spans(height, size[0], stride[0]):
            for columns in spans(width, size[1], stride[1]):
                total[:, :, rows, columns] += self.whole_logits(pixel_values[:, :, rows, columns])
                count[rows, columns] += 1
        return total / count


class SegmentationModel(WindowedLogits, PreTrainedModel):
    """A segmentor. Backbone and head may have different dtypes; each computes in its own."""

    config_class = SegmentationConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__(config)
        self.backbone = self.build_backbone(**config.backbone_settings)
        self.neck = build_pyramid(config.pyramid)
        kinds = {kind.__name__: kind for kind in (UPerHead, FCNHead)}
        arguments = {name: value for name, value in config.head.items() if name != "kind"}
        self.decode_head = kinds[config.head["kind"]](config.num_labels, config.align_corners, **arguments)
        self.post_init()

    def build_backbone(self, **settings: Any) -> nn.Module:
        """The module that makes maps (b, c, h', w') of images (b, 3, h, w)."""
        raise NotImplementedError

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        draw_tables(module)

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
        padded = padded_to(self.config.patch_size, pixel_values)
        maps = self.backbone(padded.to(next(self.backbone.parameters()).dtype))
        head = self.decode_head
        maps = [features.to(head.conv_seg.weight.dtype) for features in maps]
        coarse = head(maps if self.neck is None else self.neck(maps))
        logits = resized(coarse, padded, self.config.align_corners)[:, :, :height, :width]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, ignore_index=self.config.loss_ignore_index)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    def whole_logits(self, pixel_values: Tensor) -> Tensor:
        return self(pixel_values).logits.float()


def spans(side: int, size: int, step: int) -> Iterator[slice]:
    """The windows along one side of an image; the last one is moved inside it."""
    for number in range(max(side - size + step - 1, 0) // step + 1):
        end = min(number * step + size, side)
        yield slice(max(end - size, 0), end)


def padded_to(patch_size: Sequence[int], image: Tensor) -> Tensor:
    """image (b, c, h, w) with zeros below and to the right, so that its sides are multiples of patch_size."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % patch_size[1], 0, -height % patch_size[0]))


def draw_tables(module: Any) -> None:
    """Computes the tables of a module of timm that no file holds: a model to be loaded is built without values."""
    if hasattr(module, "init_non_persistent_buffers"):
        module.init_non_persistent_buffers()
