"""Backbones and heads, registered in mmseg under their published names. Plain modules: they know nothing of
DeepSpeed."""

from internseg_ds.models.adapters.timm_backbone import TimmBackbone
from internseg_ds.models.adapters.transformers_backbone import TransformersBackbone
from internseg_ds.models.beit import MAE, BEiT
from internseg_ds.models.eomt.segmentor import EoMT
from internseg_ds.models.fcn_head import FCNHead
from internseg_ds.models.feature_pyramids import SimpleFeaturePyramid, ViTFeaturePyramid
from internseg_ds.models.intern_image.intern_image import InternImage
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B
from internseg_ds.models.intern_vit.vit_adapter import InternViTAdapter
from internseg_ds.models.mask2former.segmentor import EncoderDecoderMask2Former

__all__ = [
    "MAE",
    "BEiT",
    "EncoderDecoderMask2Former",
    "EoMT",
    "FCNHead",
    "InternImage",
    "InternViT6B",
    "InternViTAdapter",
    "SimpleFeaturePyramid",
    "TimmBackbone",
    "TransformersBackbone",
    "ViTFeaturePyramid",
]
