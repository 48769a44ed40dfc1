"""The pixel decoder of Mask2Former: three maps attend to each other with multi-scale deformable attention, the finest one joins as in a feature pyramid.

In: feature maps of a backbone. Out: features of the finest map's size for masks, and maps for the decoder. mmdet's class gives the modules, their names and
initial values; the forward is written anew so that sizes of maps stay Python numbers: no waiting for a GPU, and it runs on tensors without values (planning).
Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", 2022, section 3.2.2.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import PLUGIN_LAYERS
from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.plugins import MSDeformAttnPixelDecoder as MmdetPixelDecoder
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internseg_ds.models.deformable_attention import DeformableAttention, pixel_centres


class RecomputedFFN(FFN):
    """mmcv's FFN (its arguments and parameters) with the published switch `with_cp`: what lies between input and output is computed again in the
    backward pass."""

    def __init__(self, *args: Any, with_cp: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.with_cp = with_cp

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """x (n, b, c) -> (n, b, c); identity (default x) is added."""
        run = super().forward
        return (
            checkpoint(run, x, identity, use_reentrant=False)
            if self.with_cp and torch.is_grad_enabled()
            else run(x, identity)
        )


def with_own_layers(sequence: Mapping[str, Any], replaced: Mapping[str, type]) -> Any:
    """The config of a sequence of transformer layers, a copy, in which attentions named in `replaced` and mmcv's FFN are built from our classes.

    As in mmcv, `transformerlayers`, `attn_cfgs` and `ffn_cfgs` are one config for all or a list; without `ffn_cfgs` a layer has mmcv's own.
    """
    sequence = copy.deepcopy(sequence)
    for layer in _each(sequence["transformerlayers"]):
        for attention in _each(layer["attn_cfgs"]):
            attention["type"] = replaced.get(attention["type"], attention["type"])
        for ffn in _each(layer.get("ffn_cfgs", [])):
            if ffn.get("type", "FFN") == "FFN":
                ffn["type"] = RecomputedFFN
    return sequence


def _each(configs: Any) -> Sequence[Any]:
    return [configs] if isinstance(configs, Mapping) else configs


@PLUGIN_LAYERS.register_module(force=True)
class MSDeformAttnPixelDecoder(MmdetPixelDecoder):  # the name that published configs use
    """mmdet's class: its arguments, modules and results."""

    def __init__(self, *, encoder: Mapping[str, Any], **decoder: Any) -> None:
        super().__init__(
            encoder=with_own_layers(encoder, {"MultiScaleDeformableAttention": DeformableAttention}),
            **decoder,
        )

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """feats: maps (b, c_i, h_i, w_i), finest first. Returns mask features (b, out_channels, h_0, w_0) and `num_outs` maps (b, feat_channels, h, w),
        coarsest first."""
        levels = range(self.num_encoder_levels)
        coarse = [feats[self.num_input_levels - 1 - level] for level in levels]
        shapes = [tuple(feat.shape[-2:]) for feat in coarse]
        level_codes = self.level_encoding(torch.arange(self.num_encoder_levels, device=feats[0].device))
        tokens, codes = [], []
        for level in levels:
            projected = self.input_convs[level](coarse[level])
            position = self.postional_encoding(
                projected.new_zeros(len(projected), *shapes[level], dtype=torch.bool)
            )
            tokens.append(tokens_of(projected))
            codes.append(tokens_of(position + level_codes[level][:, None, None]))
        reference_points = pixel_centres(shapes, tokens[0])[None, :, None].expand(
            len(coarse[0]), -1, len(shapes), -1
        )
        memory = self.encoder(
            query=torch.cat(tokens),
            key=None,
            value=None,
            query_pos=torch.cat(codes),
            spatial_shapes=shapes,
            reference_points=reference_points,
        )
        parts = memory.split([height * width for height, width in shapes])
        maps = [part.permute(1, 2, 0).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
        for level in range(self.num_input_levels - self.num_encoder_levels - 1, -1, -1):
            lateral = self.lateral_convs[self.num_input_levels - self.num_encoder_levels - 1 - level](
                feats[level]
            )
            finer = lateral + F.interpolate(
                maps[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False
            )
            maps.append(self.output_convs[self.num_input_levels - self.num_encoder_levels - 1 - level](finer))
        return self.mask_feature(maps[-1]), maps[: self.num_outs]


def tokens_of(features: Tensor) -> Tensor:
    """(b, c, h, w) -> (h w, b, c), row by row."""
    return features.flatten(2).permute(2, 0, 1)
