"""Which segmentors transformers can load, and how."""

from typing import Any

from mmseg.models.decode_heads import UPerHead

from internseg_ds.models.adapters.transformers_backbone import TransformersBackbone
from internseg_ds.models.adapters.transformers_configs import transformers_library
from internseg_ds.models.adapters.transformers_staged import StagedModel
from internseg_ds.models.eomt.segmentor import EoMT
from internseg_ds.models.huggingface.backbones_with_code import code_of
from internseg_ds.models.huggingface.brought_code import FOLDER, convolutional_format
from internseg_ds.models.huggingface.decode_heads import HEADS
from internseg_ds.models.huggingface.eomt import eomt_format
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat
from internseg_ds.models.huggingface.upernet import is_upernet, upernet_format
from internseg_ds.models.mask2former.segmentor import EncoderDecoderMask2Former

LOADED = (
    "UPerHead, FCNHead and Mask2FormerHead on InternViT6B, InternViTAdapter, InternImage, a TimmBackbone, or a "
    "TransformersBackbone",
    "EoMT on a DINOv3",
)

CODE_FILES = (
    *(file.name for file in sorted(FOLDER.glob("*.py")) if file.stem != "__init__"),
    "modeling_internvit_upernet.py",
)
"""Names of files that a folder may bring; the last is an earlier version's."""


def segmentor_format(segmentor: Any) -> SegmentorFormat:
    """How transformers loads a segmentor of mmseg, which may lie on the meta device. Raises ValueError for one that
    no class of transformers, and no code of ours, computes."""
    transformers_library()
    if isinstance(segmentor, EoMT):
        return eomt_format(segmentor)
    head, backbone = segmentor.decode_head, segmentor.backbone
    staged = isinstance(backbone, TransformersBackbone) and isinstance(backbone._kind, StagedModel)
    code = code_of(backbone)
    if isinstance(segmentor, EncoderDecoderMask2Former) and code is not None:
        from internseg_ds.models.huggingface.mask2former import mask2former_format  # imports mmdet

        return mask2former_format(segmentor, None if staged else code)
    if isinstance(head, UPerHead) and staged and is_upernet(segmentor):
        return upernet_format(segmentor)
    if isinstance(head, HEADS) and code is not None:
        return convolutional_format(segmentor, code)
    raise ValueError(
        f"transformers has no class for {type(segmentor).__name__} with {type(head).__name__} on "
        f"{type(backbone).__name__}; what it loads is " + "; ".join(LOADED)
    )
