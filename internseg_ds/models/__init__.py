"""Backbones and heads, registered in mmseg under their published names. Plain modules: they know nothing of DeepSpeed."""

from internseg_ds.models.beit import MAE, BEiT
from internseg_ds.models.fcn_head import FCNHead
from internseg_ds.models.intern_image import InternImage
from internseg_ds.models.intern_vit_6b import InternViT6B
from internseg_ds.models.mask2former import EncoderDecoderMask2Former
from internseg_ds.models.vit_adapter import InternViTAdapter

__all__ = [
    "MAE",
    "BEiT",
    "EncoderDecoderMask2Former",
    "FCNHead",
    "InternImage",
    "InternViT6B",
    "InternViTAdapter",
]
