"""A backbone of timm for semantic segmentation, in a file that needs torch, transformers, timm, and
segmentation_parts.py beside it.

A folder with these files, its config.json and its weights is loaded by
`AutoModelForSemanticSegmentation.from_pretrained(FOLDER, trust_remote_code=True)`. Letters: b images, (h, w) a size, c
channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import Tensor, nn

from .segmentation_parts import SegmentationConfig, SegmentationModel, build_pyramid


class TimmConfig(SegmentationConfig):
    """backbone_settings: the arguments of `TimmModel`."""

    model_type = "timm_segmentation"


class TimmModel(nn.Module):
    """model_name, model_args: those of `timm.create_model`. out_indices: blocks, or stages, whose outputs become maps.
    final_norm: these pass the model's last norm. pyramid: a feature pyramid behind them, or None."""

    def __init__(
        self,
        model_name: str,
        model_args: Mapping[str, Any],
        out_indices: Sequence[int],
        final_norm: bool,
        pyramid: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.out_indices, self.final_norm = list(out_indices), final_norm
        self.model: Any = timm.create_model(model_name, num_classes=0, **model_args)
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=not final_norm, prune_head=True)
        self.neck = build_pyramid(pyramid)

    def forward(self, image: Tensor) -> Sequence[Tensor]:
        """image: (b, 3, h, w) -> maps (b, c, h', w')."""
        maps = self.model.forward_intermediates(
            image,
            indices=self.out_indices,
            norm=self.final_norm,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return maps if self.neck is None else self.neck(maps)


class TimmForSemanticSegmentation(SegmentationModel):
    """A model of timm and a head."""

    config_class = TimmConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return TimmModel(**settings)
