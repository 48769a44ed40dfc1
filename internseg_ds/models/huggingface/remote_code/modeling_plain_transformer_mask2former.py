"""transformers' Mask2Former over a plain transformer: `AutoModelForUniversalSegmentation.from_pretrained(FOLDER,
trust_remote_code=True)` loads a folder with this file and those that it imports."""

from typing import Any

from torch import nn

from .mask2former_parts import (
    BroughtBackbone,
    BroughtBackboneConfig,
    Mask2FormerWithCode,
    Mask2FormerWithCodeConfig,
    register,
)
from .modeling_plain_transformer import PlainTransformer


class PlainTransformerBackboneConfig(BroughtBackboneConfig):
    """settings: those of `PlainTransformer`."""

    model_type = "plain_transformer_backbone"


class PlainTransformerBackbone(BroughtBackbone):
    """PlainTransformer alone."""

    config_class = PlainTransformerBackboneConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return PlainTransformer(**settings)


register(PlainTransformerBackboneConfig, PlainTransformerBackbone)


class PlainTransformerMask2FormerConfig(Mask2FormerWithCodeConfig):
    """backbone_config: that of `PlainTransformerBackbone`."""

    model_type = "plain_transformer_mask2former"


class PlainTransformerForUniversalSegmentation(Mask2FormerWithCode):
    """PlainTransformer and Mask2Former's head."""

    config_class = PlainTransformerMask2FormerConfig
