"""mmseg's UPerHead over a backbone of stages of transformers, as transformers' UperNetForSemanticSegmentation."""

import re
from typing import Any

import torch

from internseg_ds.models.huggingface.decode_heads import check_head
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat, format_of, weight_names

RENAMED = (
    (re.compile(r"^backbone\.model\."), "backbone."),
    (re.compile(r"^(decode_head\..*)\.bn\."), r"\1.batch_norm."),
    (re.compile(r"^decode_head\.conv_seg\."), "decode_head.classifier."),
)


def is_upernet(segmentor: Any) -> bool:
    """Whether transformers' class computes what a segmentor with a `TransformersBackbone` of stages and a UPerHead
    does: without necks, from all maps, with corners that are not aligned."""
    backbone, head = segmentor.backbone, segmentor.decode_head
    return (
        not segmentor.with_neck
        and backbone.neck is None
        and not head.align_corners
        and list(head.in_index) == list(range(len(backbone.channels)))
    )


def upernet_format(segmentor: Any) -> SegmentorFormat:
    """segmentor: one that `is_upernet`, on the meta device. Raises ValueError where transformers' class would compute
    something else."""
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    backbone, head = segmentor.backbone, check_head(segmentor)
    _, fields = backbone.exported("transformers")
    config = UperNetConfig(
        backbone_config=fields,
        hidden_size=head.channels,
        pool_scales=list(head.psp_modules.pool_scales),
        use_auxiliary_head=False,
        loss_ignore_index=head.ignore_index,
        num_labels=head.out_channels,
    )
    with torch.device("meta"):
        theirs = UperNetForSemanticSegmentation(config)
    names = {}
    for name in weight_names(segmentor):
        their = name
        for pattern, new in RENAMED:
            their = pattern.sub(new, their)
        names[name] = (their,)
    return format_of(
        segmentor,
        theirs,
        names,
        loader="UperNetForSemanticSegmentation",
        processor="SegformerImageProcessor",
    )
