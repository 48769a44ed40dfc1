"""Which segmentors transformers can load, and how."""

from typing import Any

from mmseg.models.decode_heads import UPerHead
from torch import nn

from internseg_ds.models.adapters.transformers_backbone import TransformersBackbone
from internseg_ds.models.adapters.transformers_configs import transformers_library
from internseg_ds.models.adapters.transformers_staged import StagedModel
from internseg_ds.models.eomt.segmentor import EoMT
from internseg_ds.models.huggingface.eomt import eomt_format
from internseg_ds.models.huggingface.internvit_upernet import CODE, MODEL_TYPE, internvit_upernet_format
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat
from internseg_ds.models.huggingface.upernet import upernet_format
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B
from internseg_ds.models.intern_vit.vit_adapter import InternViTAdapter

LOADED = (
    "UPerHead on InternViT6B, or on a TransformersBackbone that is an InternViT",
    "UPerHead on a TransformersBackbone of stages (swin, convnext, ...)",
    "EoMT on a DINOv3",
)

CODE_FILES = (CODE.name,)
"""Names of files that a folder may bring."""


def segmentor_format(segmentor: Any) -> SegmentorFormat:
    """How transformers loads a segmentor of mmseg, which may lie on the meta device. Raises ValueError for one that
    no class of transformers, and no code of ours, computes."""
    transformers_library()
    if isinstance(segmentor, EoMT):
        return eomt_format(segmentor)
    head, backbone = segmentor.decode_head, segmentor.backbone
    if isinstance(head, UPerHead) and _is_internvit(backbone):
        return internvit_upernet_format(segmentor)
    if isinstance(head, UPerHead) and _has_stages(backbone):
        return upernet_format(segmentor)
    raise ValueError(
        f"transformers has no class for {type(segmentor).__name__} with {type(head).__name__} on "
        f"{type(backbone).__name__}; what it loads is " + "; ".join(LOADED)
    )


def _is_internvit(backbone: nn.Module) -> bool:
    if isinstance(backbone, TransformersBackbone):
        return backbone.model.config.model_type == MODEL_TYPE
    return isinstance(backbone, InternViT6B) and not isinstance(backbone, InternViTAdapter)


def _has_stages(backbone: nn.Module) -> bool:
    return isinstance(backbone, TransformersBackbone) and isinstance(backbone._kind, StagedModel)
