"""Feature maps at four scales from a plain transformer, whose maps all have the size of its patch grid.

In: maps (b, c, h, w), (h, w) the patch grid. Out: maps at 4x, 2x, 1x and 1/2 of it, as heads for hierarchical
backbones take them. The necks are mmseg's NECKS: `model.neck` (computed with the heads, in fp32), or `neck` of
a backbone that has the argument (computed with the backbone, in its dtype).
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmseg.models.builder import NECKS
from torch import Tensor, nn

from internseg_ds.models.norms import ChannelsFirstLayerNorm


class UpConv(nn.ConvTranspose2d):
    """A 2x2 transposed convolution of stride 2, (b, c, h, w) -> (b, d, 2 h, 2 w), initialised from a
    normal of variance 2 / (4 d), with zero bias. d: out_channels, default c."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__(channels, out_channels or channels, kernel_size=2, stride=2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(2 / (4 * self.out_channels)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class HalvingPool(nn.MaxPool2d):
    """A 2x2 max pooling of stride 2 that keeps a side of one element, where torch's raises."""

    def __init__(self) -> None:
        super().__init__(kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, c, h, w) -> (b, c, max(1, h // 2), max(1, w // 2)) in the same dtype."""
        kernel = [min(2, side) for side in x.shape[2:]]
        return F.max_pool2d(x, kernel, stride=kernel)


def pyramid_stages(width: int, *, with_norm: bool) -> tuple[nn.Sequential, ...]:
    """The layers that bring maps of `width` channels to 4x, 2x, 1x and 1/2 of their size, as InternViT's
    published code has them. with_norm: a LayerNorm of the channels behind each."""

    def stage(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*layers, *([ChannelsFirstLayerNorm(width)] if with_norm else []))

    return (
        stage(UpConv(width), ChannelsFirstLayerNorm(width), nn.GELU(), UpConv(width)),
        stage(UpConv(width)),
        stage(nn.Identity()),
        stage(HalvingPool()),
    )


@NECKS.register_module()
class ViTFeaturePyramid(BaseModule):
    """InternViT's pyramid for any plain transformer: four maps of one width, each brought to a scale of its
    own. Source: OpenGVLab/InternVL `segmentation/mmseg_custom/models/backbones/intern_vit_6b.py`.

    in_channels: channels of all four maps, or a list of four equal numbers. with_norm: a LayerNorm behind each
    scale. Raises ValueError for another number of maps, or maps of different widths.
    """

    def __init__(self, in_channels: int | Sequence[int], with_norm: bool = False) -> None:
        super().__init__()
        widths = [in_channels] * 4 if isinstance(in_channels, int) else list(in_channels)
        if len(widths) != 4 or len(set(widths)) != 1:
            raise ValueError(f"ViTFeaturePyramid takes four maps of one width, not {widths}")
        self.stages = nn.ModuleList(pyramid_stages(widths[0], with_norm=with_norm))
        self.channels = tuple(widths)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """maps: four of (b, c, h, w) -> maps of c channels at 4x, 2x, 1x and 1/2 of (h, w)."""
        return tuple(stage(features) for stage, features in zip(self.stages, maps, strict=True))


@NECKS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps at 4x, 2x, 1x and 1/2 from the last map alone (Li et al., "Exploring plain Vision Transformer
    backbones for object detection", 2022, section 3 and appendix).

    in_channels: channels of the last map, or of all maps. out_channels: of each scale.
    """

    def __init__(self, in_channels: int | Sequence[int], out_channels: int = 256) -> None:
        super().__init__()
        width = in_channels if isinstance(in_channels, int) else in_channels[-1]
        half, quarter = width // 2, width // 4
        scales: list[tuple[list[nn.Module], int]] = [
            (
                [
                    UpConv(width, half),
                    ChannelsFirstLayerNorm(half),
                    nn.GELU(),
                    UpConv(half, quarter),
                ],
                quarter,
            ),
            ([UpConv(width, half)], half),
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
        self.channels = (out_channels,) * 4

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """maps: the last is (b, c, h, w) -> maps of `out_channels` at 4x, 2x, 1x and 1/2 of (h, w)."""
        return tuple(stage(maps[-1]) for stage in self.stages)
