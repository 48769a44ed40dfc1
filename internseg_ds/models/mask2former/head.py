"""`Mask2FormerHead`: a set of queries, each of which predicts one mask and its class (Cheng et al.,
"Masked-attention Mask Transformer", 2022).

In: feature maps of a backbone; for training, the binary masks and classes of each image. Out: losses of every
decoder layer, or logits of pixels. mmdet's class provides modules, their published names and initial values,
and the assigner its costs; the losses are `mask_losses.MaskLosses`. The forward is written here so that no
shape depends on a value: the host need not wait for the GPU, and memory estimates need no values. Source of
facts: OpenGVLab/InternImage `segmentation/mmseg_custom/models/decode_heads/mask2former_head.py`.

Letters: b images, q queries, c channels, (h_i, w_i) size of map i (0 the finest).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv import ConfigDict
from mmdet.models.dense_heads import Mask2FormerHead as MmdetHead
from torch import Tensor, nn

from internseg_ds.models.mask2former.config_checks import check_arguments, check_layers, check_train_cfg
from internseg_ds.models.mask2former.mask_losses import MaskLosses
from internseg_ds.models.mask2former.masked_attention import MaskedAttention

# registers the decoder, too
from internseg_ds.models.mask2former.pixel_decoder import tokens_of, with_own_layers


class Mask2FormerHead(MaskLosses, MmdetHead):
    """The published head, with mmdet's arguments.

    num_classes: without "no object"; where it is missing, the number of things and stuff together, which this
    head treats alike. in_index: which of the backbone's maps, finest first, default all. Further arguments
    are mmdet's. Raises ValueError for settings that cannot train (`config_checks`).
    """

    def __init__(
        self,
        num_classes: int | None = None,
        num_things_classes: int = 0,
        num_stuff_classes: int = 0,
        in_index: Sequence[int] | None = None,
        align_corners: bool = False,
        *,
        pixel_decoder: Mapping[str, Any],
        transformer_decoder: Mapping[str, Any],
        train_cfg: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        classes = num_classes or num_things_classes + num_stuff_classes
        check_train_cfg(
            train_cfg,
            "Mask2FormerHead",
            segmentor="EncoderDecoderMask2Former",
            required="num_points, assigner and sampler",
            example="configs/_base_/models/mask2former_intern_image_h.py",
        )
        check_layers(pixel_decoder, transformer_decoder, arguments.get("num_transformer_feat_level", 3))
        check_arguments(arguments, classes)
        decoder = with_own_layers(transformer_decoder, {"MultiheadAttention": MaskedAttention})
        super().__init__(
            num_things_classes=classes,
            num_stuff_classes=0,
            pixel_decoder=pixel_decoder,
            transformer_decoder=decoder,
            train_cfg=ConfigDict(train_cfg),
            **arguments,
        )
        self.out_channels = self.num_classes
        self.in_index = in_index
        self.align_corners = align_corners

    def layer_id(self, name: str) -> int | None:
        """The layer of a parameter for InternImage's layer-wise learning-rate decay; name is relative to the
        head.

        0, the first layer, for embeddings and what predicts masks and classes, as in the published code; None
        for what counts as behind the backbone.
        """
        first = name.startswith(("mask_embed", "cls_embed", "level_embed", "query_embed", "query_feat"))
        return 0 if first else None

    def init_weights(self) -> None:
        """As mmdet's, but with zero biases of the attentions' output projections, as torch's attention
        has."""
        super().init_weights()
        for layer in self.transformer_decoder.layers:
            for attention in layer.attentions:
                nn.init.zeros_(attention.attn.out_proj.bias)

    def forward(self, features: Sequence[Tensor], _: Any = None) -> tuple[list[Tensor], list[Tensor]]:
        """features: the backbone's maps, (b, in_channels[i], h_i, w_i).

        Returns class scores (b, q, num_classes + 1) and mask logits (b, q, h_0, w_0), in the dtype of the
        features: a list of each, of the queries before the first decoder layer and after every layer.
        """
        if self.in_index is not None:
            features = [features[index] for index in self.in_index]
        mask_features, maps = self.pixel_decoder(features)
        maps = maps[: self.num_transformer_feat_level]
        keys, key_positions = self._keys(maps)
        numbers = torch.arange(self.num_queries, device=mask_features.device)
        # (q, b, c)
        queries = self.query_feat(numbers)[:, None].expand(-1, len(mask_features), -1)
        positions = self.query_embed(numbers)[:, None].expand(-1, len(mask_features), -1)
        scores, masks = self._predict(queries, mask_features)
        all_scores = [scores]
        all_masks = [masks]
        for index, layer in enumerate(self.transformer_decoder.layers):
            level = index % len(maps)  # layers attend to the maps in turn
            queries = layer(
                query=queries,
                key=keys[level],
                value=keys[level],
                query_pos=positions,
                key_pos=key_positions[level],
                attn_masks=[_not_attended(masks, maps[level].shape[-2:]), None],
            )
            scores, masks = self._predict(queries, mask_features)
            all_scores.append(scores)
            all_masks.append(masks)
        return all_scores, all_masks

    def _keys(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """maps: (b, c, h_i, w_i), coarsest first -> of each, what queries attend to, and its positional
        encoding: (h_i w_i, b, c) each."""
        level_codes = self.level_embed(torch.arange(len(maps), device=maps[0].device))
        keys = []
        positions = []
        for level, features in enumerate(maps):
            keys.append(tokens_of(self.decoder_input_projs[level](features)) + level_codes[level])
            no_padding = features.new_zeros(features.size(0), *features.shape[-2:], dtype=torch.bool)
            positions.append(tokens_of(self.decoder_positional_encoding(no_padding)))
        return keys, positions

    def _predict(self, queries: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """queries: (q, b, c), mask_features: (b, c, h_0, w_0) -> class scores (b, q, num_classes + 1),
        mask logits (b, q, h_0, w_0)."""
        queries = self.transformer_decoder.post_norm(queries).transpose(0, 1)
        return self.cls_embed(queries), torch.einsum(
            "bqc,bchw->bqhw", self.mask_embed(queries), mask_features
        )


def _not_attended(masks: Tensor, size: torch.Size) -> Tensor:
    """masks: logits (b, q, h_0, w_0) -> where each query must not attend, outside of its mask, on a map of
    size (h_i, w_i): (b, 1, q, h_i * w_i) bool. A query whose mask is empty there may attend everywhere."""
    outside = F.interpolate(masks.detach(), size, mode="bilinear", align_corners=False).flatten(2) < 0
    return (outside & ~outside.all(-1, keepdim=True))[:, None]
