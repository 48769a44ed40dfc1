"""`EoMTHead`: what EoMT adds to a plain transformer: queries, and a module that turns each of them into a
class and, with the patches, into a mask (Kerssies et al., "Your ViT is Secretly an Image Segmentation Model",
2025).

In: queries and patches as the backbone gives them, of several stages. Out: class scores and mask logits of
each; for training, their losses (`mask2former.mask_losses`); and which patches a query may attend to. Letters:
b images, q queries, c channels, (h, w) grid of patches, (h_0, w_0) size of the masks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv import ConfigDict
from mmcv.runner import BaseModule
from mmdet.core import build_assigner
from mmdet.models.builder import build_loss
from torch import Tensor, nn

from internseg_ds.models.eomt.mask_annealing import masked_share
from internseg_ds.models.layers import build_norm, without_autocast
from internseg_ds.models.mask2former.config_checks import check_losses, check_train_cfg
from internseg_ds.models.mask2former.mask_losses import MaskLosses

MASK_STRIDE = 4
"""Pixels of the image for one of a mask."""


class EoMTHead(MaskLosses, BaseModule):
    """num_classes: without "no object". in_channels, patch_size: of the backbone; the segmentor fills them in.
    num_queries: q. num_blocks: how many of the backbone's last blocks the queries pass. The losses and
    train_cfg are those of Mask2FormerHead, but without a sampler.

    Raises ValueError for settings that cannot train.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        patch_size: int,
        num_queries: int = 100,
        num_blocks: int = 4,
        align_corners: bool = False,
        *,
        loss_cls: Mapping[str, Any],
        loss_mask: Mapping[str, Any],
        loss_dice: Mapping[str, Any],
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_train_cfg(
            train_cfg,
            "EoMTHead",
            segmentor="EoMT",
            required="num_points and assigner",
            example="configs/_base_/models/eomt_dinov3_vit_l.py",
        )
        check_losses({"num_queries": num_queries, "loss_cls": loss_cls, "loss_mask": loss_mask}, num_classes)
        self.num_classes = self.out_channels = num_classes
        self.in_channels = in_channels
        self.num_queries = num_queries
        self.num_blocks = num_blocks
        self.align_corners = align_corners
        self.masked_shares = (1.0,) * num_blocks
        """Of each block, the share of queries that attend to their mask only; see `at_progress`."""

        self.query = nn.Embedding(num_queries, in_channels)
        self.class_head = nn.Linear(in_channels, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(in_channels, in_channels),
            nn.GELU(),
            nn.Linear(in_channels, in_channels),
            nn.GELU(),
            nn.Linear(in_channels, in_channels),
        )
        # patches of 14 pixels are doubled once, as published: masks of a stride of 7
        doublings = max(1, int(math.log2(patch_size / MASK_STRIDE)))
        self.upscale = nn.Sequential(*(_doubled(in_channels) for _ in range(doublings)))

        settings = ConfigDict(train_cfg)
        self.assigner = build_assigner(settings.assigner)
        self.num_points = settings.get("num_points", 12544)
        self.oversample_ratio = settings.get("oversample_ratio", 3.0)
        self.importance_sample_ratio = settings.get("importance_sample_ratio", 0.75)
        self.class_weight = loss_cls["class_weight"]
        self.loss_cls = build_loss(loss_cls)
        self.loss_mask = build_loss(loss_mask)
        self.loss_dice = build_loss(loss_dice)

    def at_progress(self, progress: float) -> None:
        """Sets `masked_shares` for a training that has come so far, 0 at its start and 1 at its end."""
        self.masked_shares = tuple(
            masked_share(progress, block, self.num_blocks) for block in range(self.num_blocks)
        )

    def queries_for(self, image: Tensor) -> Tensor:
        """image: (b, ...) -> the queries of each image, (b, q, c)."""
        numbers = torch.arange(self.num_queries, device=image.device)
        return self.query(numbers)[None].expand(image.size(0), -1, -1)

    @torch.no_grad()
    def attended(self, block: int, queries: Tensor, patches: Tensor) -> Tensor | None:
        """Which patches each query attends to in a block: those where its mask so far has a logit above 0,
        and for queries that are drawn not to be masked, all.

        block: from 0 to num_blocks - 1. queries: (b, q, c), patches: (b, c, h, w). Returns (b, q, h w) bool;
        None where no query is masked.
        """
        share = self.masked_shares[block]
        if share == 0:
            return None
        with without_autocast(patches):
            masks = self._masks(queries, patches)
            inside = F.interpolate(masks, patches.shape[-2:], mode="bilinear").flatten(2) > 0
            if share < 1:
                inside = inside | (torch.rand(*inside.shape[:2], 1, device=inside.device) > share)
        return inside

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """features: queries (b, q, c) and patches (b, c, h, w) of each stage in turn.

        Returns class scores (b, q, num_classes + 1) and mask logits (b, q, h_0, w_0), in the dtype that the
        head computes in: a list of each, one entry for each stage.
        """
        stages = list(zip(features[::2], features[1::2], strict=True))
        scores = [self.class_head(queries) for queries, _ in stages]
        return scores, [self._masks(queries, patches) for queries, patches in stages]

    def forward_train(
        self,
        features: Sequence[Tensor],
        img_metas: Any,
        gt_semantic_seg: Tensor,
        gt_labels: Sequence[Tensor],
        gt_masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """As of `MaskLosses`, and for the log masked_share, the mean of `masked_shares`."""
        losses = super().forward_train(features, img_metas, gt_semantic_seg, gt_labels, gt_masks)
        share = sum(self.masked_shares) / self.num_blocks
        return losses | {"masked_share": losses["loss_cls"].new_full((), share)}

    def forward_test(self, features: Sequence[Tensor], img_metas: Any = None, test_cfg: Any = None) -> Tensor:
        """As of `MaskLosses`, of the last stage: (b, num_classes, h_0, w_0)."""
        return super().forward_test(features[-2:], img_metas, test_cfg)

    def _masks(self, queries: Tensor, patches: Tensor) -> Tensor:
        """queries: (b, q, c), patches: (b, c, h, w) -> logits (b, q, h_0, w_0)."""
        return torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), self.upscale(patches))


def _doubled(channels: int) -> nn.Sequential:
    """(b, c, h, w) -> (b, c, 2 h, 2 w)."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
        nn.GELU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False),
        build_norm(channels, "LN", "channels_first", "channels_first"),
    )
