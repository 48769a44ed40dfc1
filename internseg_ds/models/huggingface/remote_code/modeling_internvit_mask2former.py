"""transformers' Mask2Former over InternViT: `AutoModelForUniversalSegmentation.from_pretrained(FOLDER,
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
from .modeling_internvit import InternViT, InternViTSettings


class InternViTBackboneConfig(BroughtBackboneConfig):
    """settings: those of `InternViTSettings`."""

    model_type = "internvit_backbone"


class InternViTBackbone(BroughtBackbone):
    """InternViT alone."""

    config_class = InternViTBackboneConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return InternViT(InternViTSettings(**settings))


register(InternViTBackboneConfig, InternViTBackbone)


class InternViTMask2FormerConfig(Mask2FormerWithCodeConfig):
    """backbone_config: that of `InternViTBackbone`."""

    model_type = "internvit_mask2former"


class InternViTForUniversalSegmentation(Mask2FormerWithCode):
    """InternViT and Mask2Former's head."""

    config_class = InternViTMask2FormerConfig
