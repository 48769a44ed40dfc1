"""The pixel decoder of Mask2Former: three maps attend to each other with multi-scale deformable attention,
the finest one joins as in a feature pyramid.

In: feature maps of a backbone. Out: features of the finest map's size for masks, and maps for the decoder.
mmdet's class provides the modules, their names and initial values. The forward is written here so that sizes
of maps stay Python integers: the host does not wait for the GPU, and it runs on tensors without values
(memory estimates). Letters: b images, (h_i, w_i) size of map i, c channels, n tokens. Source: Cheng et al.,
"Masked-attention Mask Transformer for Universal Image Segmentation", 2022, section 3.2.2.
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

from internseg_ds.models.sampling.deformable_attention import DeformableAttention, pixel_centres


class CheckpointedFFN(FFN):
    """mmcv's FFN (its arguments and parameters) with activation checkpointing, by the published switch
    `with_cp`."""

    def __init__(self, *args: Any, with_cp: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.with_cp = with_cp

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """x: (n, b, c) -> the same shape and dtype; identity (n, b, c), default x, is added."""
        run = super().forward
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(run, x, identity, use_reentrant=False)
        return run(x, identity)


def with_own_layers(sequence: Mapping[str, Any], replaced: Mapping[str, type]) -> Any:
    """Copy the config of a sequence of transformer layers, with attentions whose type is in `replaced`, and
    mmcv's FFN, built from our classes.

    As in mmcv, `transformerlayers`, `attn_cfgs` and `ffn_cfgs` are one config for all or a list; without
    `ffn_cfgs` a layer has mmcv's own.
    """
    sequence = copy.deepcopy(sequence)
    for layer in _each(sequence["transformerlayers"]):
        for attention in _each(layer["attn_cfgs"]):
            attention["type"] = replaced.get(attention["type"], attention["type"])
        for ffn in _each(layer.get("ffn_cfgs", [])):
            if ffn.get("type", "FFN") == "FFN":
                ffn["type"] = CheckpointedFFN
    return sequence


def _each(configs: Any) -> Sequence[Any]:
    """configs: one, or a list of them."""
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
        """feats: maps (b, c_i, h_i, w_i), finest first. Returns mask features (b, out_channels, h_0, w_0) and
        `num_outs` maps (b, feat_channels, h_i, w_i), coarsest first, in the dtype of the maps."""
        maps = self._encode(
            [feats[self.num_input_levels - 1 - level] for level in range(self.num_encoder_levels)]
        )
        finer_levels = self.num_input_levels - self.num_encoder_levels
        # as in a feature pyramid: the maps that the encoder does not take join from coarse to fine
        for index in range(finer_levels):
            lateral = self.lateral_convs[index](feats[finer_levels - 1 - index])
            coarser = F.interpolate(maps[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            maps.append(self.output_convs[index](lateral + coarser))
        return self.mask_feature(maps[-1]), maps[: self.num_outs]

    def _encode(self, coarse: Sequence[Tensor]) -> list[Tensor]:
        """coarse: maps (b, c_i, h_i, w_i), coarsest first -> maps (b, feat_channels, h_i, w_i) whose
        pixels have attended to each other."""
        shapes = [(feat.size(2), feat.size(3)) for feat in coarse]
        level_codes = self.level_encoding(torch.arange(self.num_encoder_levels, device=coarse[0].device))
        tokens, codes = [], []
        for level, feat in enumerate(coarse):
            projected = self.input_convs[level](feat)
            no_padding = projected.new_zeros(projected.size(0), *shapes[level], dtype=torch.bool)
            position = self.postional_encoding(no_padding)  # mmdet's spelling
            tokens.append(tokens_of(projected))
            codes.append(tokens_of(position + level_codes[level][:, None, None]))
        reference_points = pixel_centres(shapes, tokens[0])[None, :, None].expand(
            coarse[0].size(0), -1, len(shapes), -1
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
        return [part.permute(1, 2, 0).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def tokens_of(features: Tensor) -> Tensor:
    """features: (b, c, h, w) -> (h w, b, c), row by row, in the same dtype."""
    return features.flatten(2).permute(2, 0, 1)
