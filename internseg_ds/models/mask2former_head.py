"""`Mask2FormerHead`: a set of queries, each of which says one mask and its class (Cheng et al., "Masked-attention Mask Transformer", 2022).

In: feature maps of a backbone; for training, the binary masks and classes of each image. Out: losses of every decoder layer, or logits of pixels. mmdet's
class gives modules, their published names and initial values, and the assigner its costs; forward and losses are written anew so that no shape depends on a
value (a GPU need not be waited for, planning needs no values), the assignments of all layers are computed on the CPU at once, and masks at the image's size
are sampled a few at a time. Source of facts: OpenGVLab/InternImage `segmentation/mmseg_custom/models/decode_heads/mask2former_head.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv import ConfigDict
from mmdet.core import reduce_mean
from mmdet.models.dense_heads import Mask2FormerHead as MmdetHead
from mmdet.models.utils import get_uncertain_point_coords_with_randomness
from torch import Tensor, nn

from internseg_ds.models.layers import made_on_device, without_autocast
from internseg_ds.models.mask2former_pixel_decoder import (
    tokens_of,
    with_own_layers,
)  # registers the decoder, too
from internseg_ds.models.mask2former_settings import check_arguments, check_layers, check_train_cfg
from internseg_ds.models.mask_matching import Matches, match, sampled, sampled_targets
from internseg_ds.models.masked_attention import MaskedAttention

PLANNED_MASKS = 32
"""Masks of an image that memory is planned for. An image of ADE20K has some ten classes, and seldom more than 30."""


class Mask2FormerHead(MmdetHead):
    """num_classes: without "no object"; where it is missing, things and stuff together, which are the same to this head otherwise. in_index: which of the
    backbone's maps, finest first, default all. Further arguments are mmdet's. Raises ValueError for settings that cannot train (`mask2former_settings`).

    The losses of masks are divided by the masks of one micro-batch, counted over all ranks: with gradient accumulation by those of each micro-batch, without it
    by those of the whole step. So they depend, a little, on how a global batch is split.
    """

    threshold = None
    """mmseg's, of binary segmentation."""

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
        self.out_channels, self.in_index, self.align_corners = self.num_classes, in_index, align_corners

    def layer_id(self, name: str) -> int | None:
        """0, that of the first layer, for embeddings and what makes scores and masks of queries, as InternImage's layer-wise learning-rate decay has it; None
        for what counts as after the backbone. name is relative to the head."""
        return (
            0
            if name.startswith(("mask_embed", "cls_embed", "level_embed", "query_embed", "query_feat"))
            else None
        )

    def init_weights(self) -> None:
        super().init_weights()
        for layer in self.transformer_decoder.layers:
            for attention in layer.attentions:
                nn.init.zeros_(attention.attn.out_proj.bias)  # as torch's attention has it

    def forward(self, features: Sequence[Tensor], _: Any = None) -> tuple[list[Tensor], list[Tensor]]:
        """features: the backbone's maps, (b, in_channels[i], h_i, w_i). Returns, of the queries before the first decoder layer and after each, class scores
        (b, queries, num_classes + 1) and mask logits (b, queries, h_0, w_0), the last ones last."""
        if self.in_index is not None:
            features = [features[index] for index in self.in_index]
        mask_features, maps = self.pixel_decoder(features)
        levels = range(self.num_transformer_feat_level)
        batch, device = len(mask_features), mask_features.device
        level_codes = self.level_embed(torch.arange(len(levels), device=device))
        keys, key_places = [], []
        for level in levels:
            keys.append(tokens_of(self.decoder_input_projs[level](maps[level])) + level_codes[level])
            key_places.append(
                tokens_of(
                    self.decoder_positional_encoding(
                        maps[level].new_zeros(batch, *maps[level].shape[-2:], dtype=torch.bool)
                    )
                )
            )
        numbers = torch.arange(self.num_queries, device=device)
        queries, places = (
            embedding(numbers)[:, None].expand(-1, batch, -1)
            for embedding in (self.query_feat, self.query_embed)
        )  # (queries, b, c)
        scores, masks = self._read(queries, mask_features)
        all_scores, all_masks = [scores], [masks]
        for index, layer in enumerate(self.transformer_decoder.layers):
            level = index % len(levels)
            queries = layer(
                query=queries,
                key=keys[level],
                value=keys[level],
                query_pos=places,
                key_pos=key_places[level],
                attn_masks=[_hidden(masks, maps[level].shape[-2:]), None],
            )
            scores, masks = self._read(queries, mask_features)
            all_scores.append(scores)
            all_masks.append(masks)
        return all_scores, all_masks

    def _read(self, queries: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """queries (queries, b, c), mask_features (b, c, h, w) -> class scores (b, queries, num_classes + 1), mask logits (b, queries, h, w)."""
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
        """gt_labels: of each image, the classes (n) int64 of its masks, gt_masks (n, h, w) of 0 and 1; n may be 0. gt_semantic_seg is not looked at.

        Returns loss_cls, loss_mask and loss_dice of the last layer, and d0.loss_cls ... of those before. Collective: masks are counted over all ranks.
        """
        with without_autocast(features[0]):
            all_scores, all_masks = self(features)
            matches = match(self.assigner, self.num_points, all_scores, all_masks, gt_labels, gt_masks)
            masks = reduce_mean(all_scores[0].new_full((), matches[0].image.numel())).clamp(min=1)
            labels, targets = torch.cat(list(gt_labels)), torch.cat(list(gt_masks))
            weights = made_on_device(self.class_weight, all_scores[0])
            layers = [
                self._losses(*layer, labels, targets, masks, weights)
                for layer in zip(all_scores, all_masks, matches, strict=True)
            ]
        losses = dict(layers[-1])
        for index, layer in enumerate(layers[:-1]):
            losses |= {f"d{index}.{name}": loss for name, loss in layer.items()}
        return losses

    def _losses(
        self,
        scores: Tensor,
        masks: Tensor,
        matches: Matches,
        labels: Tensor,
        targets: Tensor,
        count: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Of one layer. Without any mask the losses of masks are 0, and their modules run all the same: under ZeRO-3 all ranks run the same modules in the same
        order, or wait for each other for ever.

        scores (b, queries, num_classes + 1), masks (b, queries, h, w); labels (n), targets (n, H, W) of all images; count (a scalar): of masks,
        the mean over ranks; weights (num_classes + 1): of classes."""
        wanted = torch.full(scores.shape[:2], self.num_classes, dtype=torch.int64, device=scores.device)
        wanted[matches.image, matches.query] = labels[matches.target]
        # mmdet's loss copies its list of weights to the device in every call, for which the host waits; the function inside takes a tensor
        loss_cls = self.loss_cls.loss_weight * self.loss_cls.cls_criterion(
            scores.flatten(0, 1),
            wanted.flatten(),
            torch.ones_like(wanted.flatten()),
            class_weight=weights,
            reduction=self.loss_cls.reduction,
            avg_factor=weights[wanted].sum(),
        )
        masks = masks[matches.image, matches.query]  # (b, queries, h, w) -> (n, h, w)
        with torch.no_grad():
            points = (
                get_uncertain_point_coords_with_randomness(
                    masks[:, None], None, self.num_points, self.oversample_ratio, self.importance_sample_ratio
                )
                if len(masks)
                else masks.new_zeros(0, self.num_points, 2)
            )
            wanted_points = sampled_targets(targets, matches.target, points)
        found = sampled(masks, points)  # (n, h, w) -> (n, points)
        loss_mask = self.loss_mask(
            found.flatten(), wanted_points.flatten(), avg_factor=count * self.num_points
        )
        return {
            "loss_cls": loss_cls,
            "loss_mask": loss_mask,
            "loss_dice": self.loss_dice(found, wanted_points, avg_factor=count),
        }

    def forward_test(self, features: Sequence[Tensor], img_metas: Any = None, test_cfg: Any = None) -> Tensor:
        """What the last layer's queries say of each pixel: the sum of class probability times mask probability, (b, num_classes, h_0, w_0)."""
        with without_autocast(features[0]):
            all_scores, all_masks = self(features)
            return torch.einsum(
                "bqc,bqhw->bchw", all_scores[-1].softmax(-1)[..., :-1], all_masks[-1].sigmoid()
            )

    def stand_in_loss(self, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        """For planning, on tensors without values: what `forward_train` computes and keeps for images of PLANNED_MASKS classes, queries matched as they come.

        labels: (b, h, w). Returns a scalar.
        """
        with without_autocast(features[0]):
            all_scores, all_masks = self(features)
            images, device = len(labels), labels.device
            each = min(PLANNED_MASKS, self.num_queries)
            targets = labels.new_empty(images * each, *labels.shape[1:], dtype=torch.uint8)
            classes = labels.new_zeros(images * each)
            numbers = torch.arange(images * each, device=device)
            matches = Matches(numbers // each, numbers % each, numbers)
            total: Tensor | float = 0.0
            match(
                self.assigner,
                self.num_points,
                all_scores,
                all_masks,
                classes.split(each),
                targets.split(each),
                assign=False,
            )
            for scores, masks in zip(all_scores, all_masks, strict=True):
                weights = made_on_device(self.class_weight, scores)
                total = total + sum(
                    self._losses(
                        scores, masks, matches, classes, targets, scores.new_ones(()), weights
                    ).values()
                )
            return total


def _hidden(masks: Tensor, size: torch.Size) -> Tensor:
    """Where each query is not to look: outside of its mask; a query whose mask is empty may look everywhere.

    masks: logits (b, queries, h, w). size: (height, width) of the map that is looked at. Returns (b, 1, queries, height * width) bool.
    """
    outside = F.interpolate(masks.detach(), size, mode="bilinear", align_corners=False).flatten(2) < 0
    return (outside & ~outside.all(-1, keepdim=True))[:, None]
