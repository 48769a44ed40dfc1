"""A backbone of stages of transformers (Swin, ConvNeXt, ...) under heads and necks that transformers has no class for:
`AutoModelForSemanticSegmentation.from_pretrained(FOLDER, trust_remote_code=True)` loads a folder with this file and
segmentation_parts.py beside it. Both need torch and transformers alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig

from .segmentation_parts import SegmentationConfig, SegmentationModel, build_pyramid


class StagedTransformerConfig(SegmentationConfig):
    """backbone_settings: the arguments of `StagedTransformer`."""

    model_type = "staged_transformer_segmentation"


class StagedTransformer(nn.Module):
    """model: the fields of its configuration, model_type and out_indices among them. pyramid: a feature pyramid behind
    the maps, or None."""

    def __init__(self, model: Mapping[str, Any], pyramid: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.model: Any = AutoBackbone.from_config(AutoConfig.for_model(**model))
        self.neck = build_pyramid(pyramid)

    def forward(self, image: Tensor) -> Sequence[Tensor]:
        """image: (b, c, h, w) -> maps (b, c, h', w')."""
        maps = list(self.model(pixel_values=image).feature_maps)
        return maps if self.neck is None else self.neck(maps)


class StagedTransformerForSemanticSegmentation(SegmentationModel):
    """Stages and a head."""

    config_class = StagedTransformerConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return StagedTransformer(**settings)
