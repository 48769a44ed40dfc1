"""transformers' Mask2Former over InternImage: `AutoModelForUniversalSegmentation.from_pretrained(FOLDER,
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
from .modeling_internimage import InternImage, InternImageSettings


class InternImageBackboneConfig(BroughtBackboneConfig):
    """settings: those of `InternImageSettings`."""

    model_type = "internimage_backbone"


class InternImageBackbone(BroughtBackbone):
    """InternImage alone."""

    config_class = InternImageBackboneConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return InternImage(InternImageSettings(**settings))


register(InternImageBackboneConfig, InternImageBackbone)


class InternImageMask2FormerConfig(Mask2FormerWithCodeConfig):
    """backbone_config: that of `InternImageBackbone`."""

    model_type = "internimage_mask2former"


class InternImageForUniversalSegmentation(Mask2FormerWithCode):
    """InternImage and Mask2Former's head."""

    config_class = InternImageMask2FormerConfig
