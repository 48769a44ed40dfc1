"""transformers' Mask2Former over a model of timm: `AutoModelForUniversalSegmentation.from_pretrained(FOLDER,
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
from .modeling_timm import TimmModel


class TimmBackboneConfig(BroughtBackboneConfig):
    """settings: those of `TimmModel`."""

    model_type = "timm_backbone"


class TimmBackbone(BroughtBackbone):
    """Timm alone."""

    config_class = TimmBackboneConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return TimmModel(**settings)


register(TimmBackboneConfig, TimmBackbone)


class TimmMask2FormerConfig(Mask2FormerWithCodeConfig):
    """backbone_config: that of `TimmBackbone`."""

    model_type = "timm_mask2former"


class TimmForUniversalSegmentation(Mask2FormerWithCode):
    """Timm and Mask2Former's head."""

    config_class = TimmMask2FormerConfig
