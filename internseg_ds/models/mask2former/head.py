"""`Mask2FormerHead`: a set of queries, each of which predicts one mask and its class (Cheng et al.,
"Masked-attention Mask Transformer", 2022).

In: feature maps of a backbone; for training, the binary masks and classes of each image. Out: losses of every
decoder layer, or logits of pixels. mmdet's class provides modules, their published names and initial values,
and the assigner its costs. Forward and losses are written here so that no shape depends on a value (the host
need not wait for the GPU, and memory estimates need no values), the assignments of all layers are computed on
the CPU at once, and masks at the image's size are sampled a few at a time. Source of facts:
OpenGVLab/InternImage `segmentation/mmseg_custom/models/decode_heads/mask2former_head.py`.

Letters: b images, q queries, c channels, (h_i, w_i) size of map i (0 the finest), (H, W) size of the images,
n masks of an image or of all images, p sampled points of a mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmcv import ConfigDict
from mmdet.core import reduce_mean
from mmdet.models.dense_heads import Mask2FormerHead as MmdetHead
from mmdet.models.utils import get_uncertain_point_coords_with_randomness
from torch import Tensor, nn

from internseg_ds.models.layers import vector_on_device, without_autocast
from internseg_ds.models.mask2former.config_checks import check_arguments, check_layers, check_train_cfg
from internseg_ds.models.mask2former.mask_matching import (
    Matches,
    match,
    matching_costs,
    sampled,
    sampled_targets,
)
from internseg_ds.models.mask2former.masked_attention import MaskedAttention

# registers the decoder, too
from internseg_ds.models.mask2former.pixel_decoder import tokens_of, with_own_layers

PLANNED_MASKS = 32
"""Masks of an image in the memory estimate. An image of ADE20K has some ten classes, and seldom more than
30."""


@dataclass(frozen=True)
class Truth:
    """What the losses of all layers are computed against."""

    labels: Tensor
    """(n) int64: the classes of the masks of all images."""
    masks: Tensor
    """(n, H, W) of 0 and 1, any dtype."""
    count: Tensor
    """A scalar: number of masks, the mean over ranks, at least 1."""
    class_weights: Tensor
    """(num_classes + 1)."""


class Mask2FormerHead(MmdetHead):
    """The published head, with mmdet's arguments.

    num_classes: without "no object"; where it is missing, the number of things and stuff together, which this
    head treats alike. in_index: which of the backbone's maps, finest first, default all. Further arguments
    are mmdet's. Raises ValueError for settings that cannot train (`config_checks`).

    The mask losses are divided by the number of masks of one micro-batch over all ranks: with gradient
    accumulation by those of each micro-batch, without it by those of the whole step. So they depend, a
    little, on how a global batch is split.
    """

    threshold = None
    """mmseg's attribute, of binary segmentation; mmseg's test code reads it of every head."""

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
        check_train_cfg(train_cfg)
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
            no_padding = features.new_zeros(len(features), *features.shape[-2:], dtype=torch.bool)
            positions.append(tokens_of(self.decoder_positional_encoding(no_padding)))
        return keys, positions

    def _predict(self, queries: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """queries: (q, b, c), mask_features: (b, c, h_0, w_0) -> class scores (b, q, num_classes + 1),
        mask logits (b, q, h_0, w_0)."""
        queries = self.transformer_decoder.post_norm(queries).transpose(0, 1)
        return self.cls_embed(queries), torch.einsum(
            "bqc,bchw->bqhw", self.mask_embed(queries), mask_features
        )

    def forward_train(
        self,
        features: Sequence[Tensor],
        img_metas: Any,
        gt_semantic_seg: Tensor,
        gt_labels: Sequence[Tensor],
        gt_masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """features: as of `forward`. Of each image gt_labels (n) int64, the classes of its masks, and
        gt_masks (n, H, W) of 0 and 1, any dtype; n may be 0. gt_semantic_seg and img_metas are not used.

        Returns loss_cls, loss_mask and loss_dice of the last layer, and d0.loss_cls ... of those before,
        scalars. Collective: masks are counted over all ranks.
        """
        with without_autocast(features[0]):
            all_scores, all_masks = self(features)
            matches = match(self.assigner, self.num_points, all_scores, all_masks, gt_labels, gt_masks)
            count = reduce_mean(all_scores[0].new_full((), matches[0].image.numel())).clamp(min=1)
            truth = Truth(
                torch.cat(list(gt_labels)),
                torch.cat(list(gt_masks)),
                count,
                vector_on_device(self.class_weight, all_scores[0]),
            )
            layers = [
                self._losses(*layer, truth) for layer in zip(all_scores, all_masks, matches, strict=True)
            ]
        losses = dict(layers[-1])
        for index, layer in enumerate(layers[:-1]):
            losses |= {f"d{index}.{name}": loss for name, loss in layer.items()}
        return losses

    def _losses(self, scores: Tensor, masks: Tensor, matches: Matches, truth: Truth) -> dict[str, Tensor]:
        """Losses of one layer: loss_cls, loss_mask and loss_dice, scalars.

        scores: (b, q, num_classes + 1), masks: (b, q, h_0, w_0). Where no image has a mask, the mask losses
        are 0, and their modules run all the same: under ZeRO-3 all ranks must run the same modules in the
        same order.
        """
        found = masks[matches.image, matches.query]  # (b, q, h_0, w_0) -> (n, h_0, w_0)
        with torch.no_grad():
            points = self._points(found)
            wanted_values = sampled_targets(truth.masks, matches.target, points)
        values = sampled(found, points)  # (n, h_0, w_0) -> (n, p)
        return {
            "loss_cls": self._class_loss(scores, matches, truth),
            "loss_mask": self.loss_mask(
                values.flatten(), wanted_values.flatten(), avg_factor=truth.count * self.num_points
            ),
            "loss_dice": self.loss_dice(values, wanted_values, avg_factor=truth.count),
        }

    def _class_loss(self, scores: Tensor, matches: Matches, truth: Truth) -> Tensor:
        """scores: (b, q, num_classes + 1). Returns a scalar."""
        wanted = torch.full(scores.shape[:2], self.num_classes, dtype=torch.int64, device=scores.device)
        wanted[matches.image, matches.query] = truth.labels[matches.target]  # the others: no object
        # mmdet's loss copies its list of class weights to the device in every call, for which the host waits.
        # The function that it calls takes a tensor.
        return self.loss_cls.loss_weight * self.loss_cls.cls_criterion(
            scores.flatten(0, 1),
            wanted.flatten(),
            torch.ones_like(wanted.flatten()),
            class_weight=truth.class_weights,
            reduction=self.loss_cls.reduction,
            avg_factor=truth.class_weights[wanted].sum(),
        )

    def _points(self, masks: Tensor) -> Tensor:
        """masks: logits (n, h_0, w_0) -> where they are compared with the truth, mostly where they are
        uncertain: (n, p, 2) in [0, 1], horizontal first."""
        if len(masks) == 0:  # mmdet's function cannot take none
            return masks.new_zeros(0, self.num_points, 2)
        return get_uncertain_point_coords_with_randomness(
            masks[:, None], None, self.num_points, self.oversample_ratio, self.importance_sample_ratio
        )

    def forward_test(self, features: Sequence[Tensor], img_metas: Any = None, test_cfg: Any = None) -> Tensor:
        """features: as of `forward`. Returns scores of pixels (b, num_classes, h_0, w_0): the sum over the
        last layer's queries of class probability times mask probability. img_metas and test_cfg are not
        used."""
        with without_autocast(features[0]):
            all_scores, all_masks = self(features)
            return torch.einsum(
                "bqc,bqhw->bchw", all_scores[-1].softmax(-1)[..., :-1], all_masks[-1].sigmoid()
            )

    def stand_in_loss(self, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        """For the memory estimate, on tensors without values: compute and keep what `forward_train` does for
        images of PLANNED_MASKS classes, with queries matched in their order.

        features: as of `forward`. labels: (b, H, W) int64. Returns a scalar.
        """
        with without_autocast(features[0]):
            all_scores, all_masks = self(features)
            images = len(labels)
            each = min(PLANNED_MASKS, self.num_queries)
            numbers = torch.arange(images * each, device=labels.device)
            matches = Matches(numbers // each, numbers % each, numbers)
            classes = labels.new_zeros(images * each)
            targets = labels.new_empty(images * each, *labels.shape[1:], dtype=torch.uint8)
            matching_costs(
                self.assigner,
                self.num_points,
                all_scores,
                all_masks,
                classes.split(each),
                targets.split(each),
            )
            total = all_scores[0].new_zeros(())
            for scores, masks in zip(all_scores, all_masks, strict=True):
                weights = vector_on_device(self.class_weight, scores)
                truth = Truth(classes, targets, scores.new_ones(()), weights)
                total = total + sum(self._losses(scores, masks, matches, truth).values())
            return total


def _not_attended(masks: Tensor, size: torch.Size) -> Tensor:
    """masks: logits (b, q, h_0, w_0) -> where each query must not attend, outside of its mask, on a map of
    size (h_i, w_i): (b, 1, q, h_i * w_i) bool. A query whose mask is empty there may attend everywhere."""
    outside = F.interpolate(masks.detach(), size, mode="bilinear", align_corners=False).flatten(2) < 0
    return (outside & ~outside.all(-1, keepdim=True))[:, None]
