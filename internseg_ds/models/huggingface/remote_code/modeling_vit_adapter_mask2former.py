"""transformers' Mask2Former over InternViT with a ViT-Adapter: `AutoModelForUniversalSegmentation.from_pretrained(
FOLDER, trust_remote_code=True)` loads a folder with this file and those that it imports."""

from typing import Any

from torch import nn

from .mask2former_parts import (
    BroughtBackbone,
    BroughtBackboneConfig,
    Mask2FormerWithCode,
    Mask2FormerWithCodeConfig,
    register,
)
from .modeling_vit_adapter import VitAdapter, VitAdapterSettings


class VitAdapterBackboneConfig(BroughtBackboneConfig):
    """settings: those of `VitAdapterSettings`."""

    model_type = "vit_adapter_backbone"


class VitAdapterBackbone(BroughtBackbone):
    """VitAdapter alone."""

    config_class = VitAdapterBackboneConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return VitAdapter(VitAdapterSettings(**settings))


register(VitAdapterBackboneConfig, VitAdapterBackbone)


class VitAdapterMask2FormerConfig(Mask2FormerWithCodeConfig):
    """backbone_config: that of `VitAdapterBackbone`."""

    model_type = "vit_adapter_mask2former"


class VitAdapterForUniversalSegmentation(Mask2FormerWithCode):
    """VitAdapter and Mask2Former's head."""

    config_class = VitAdapterMask2FormerConfig
