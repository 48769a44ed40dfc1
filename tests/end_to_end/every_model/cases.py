"""All cases: the models by part and name, and some with settings of their own; what is known of them."""

from collections.abc import Mapping
from typing import Any

from tests.end_to_end.every_model.backbones import BACKBONES, NECKS
from tests.end_to_end.every_model.heads import HEADS
from tests.end_to_end.every_model.parts import (
    CROP,
    fcn,
    levels,
    resnet,
    segmentor,
    small_swin,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "ResNet, frozen_stages": segmentor(resnet(frozen_stages=2)),
    "ResNet, norm_eval": segmentor(resnet(norm_eval=True)),
    "ResNet, DCNv2": segmentor(
        resnet(
            depth=50,
            dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
            stage_with_dcn=(False, False, True, True),
        ),
        fcn(256),
    ),
    "ResNet, with_cp": segmentor(resnet(with_cp=True)),
    "SwinTransformer, frozen_stages": segmentor(small_swin(frozen_stages=2), levels("UPerHead")),
    "SwinTransformer, ape": segmentor(small_swin(use_abs_pos_embed=True, with_cp=True), levels("UPerHead")),
    "mmcls.ConvNeXt, frozen_stages": segmentor(
        dict(BACKBONES["mmcls.ConvNeXt"]["backbone"], frozen_stages=1), levels("UPerHead")
    ),
    "PointHead, slide": dict(
        HEADS["PointHead"],
        test_cfg=dict(
            mode="slide",
            crop_size=(CROP, CROP),
            stride=(48, 48),
            subdivision_steps=1,
            subdivision_num_points=64,
            scale_factor=2,
        ),
    ),
}
CASES = {
    f"{kind} {name}": model
    for kind, models in (("backbone", BACKBONES), ("neck", NECKS), ("head", HEADS), ("setting", SETTINGS))
    for name, model in models.items()
}


WORTH_KNOWING = {
    "setting ResNet, DCNv2": "mmcv's compiled operator: sizes are not checked beforehand, it computes in "
    "fp32, and hooks are on layers",
    "head PSAHead": "mmcv's compiled operator: sizes are not checked beforehand, and hooks are on layers",
    "backbone HRNet": "its modules take lists: hooks are on layers",
    "backbone SwinTransformer": "bf16 under torch.autocast, as all backbones that do not say `follows_dtype`",
    "head LRASPPHead": "needs a map of 49 x 49 or more",
}
NOT_RUN = {
    "TIMMBackbone": "needs timm",
    "KernelUpdateHead": "a part of IterativeDecodeHead",
    "KernelUpdator": "a part of that",
}
"""Of mmseg's registry."""
CROPS = {"head LRASPPHead": 224, "backbone ICNet": 128}
"""The first pools 49 x 49 pixels of a map that is a quarter of the image's size. The second halves its image:
a last stage of one pixel would meet torch's bf16 convolution for CPUs, whose gradient of 3 x 3 weights on one
pixel is uninitialised memory at times (torch 2.13)."""


def table(found: Mapping[str, str]) -> str:
    """The rows of docs/supported_models.md."""
    rows = [
        "| part | name | two steps and an evaluation under `zero3_bf16` | worth knowing |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        part, name = case.split(" ", 1)
        verdict = "yes" if not found[case] else f"no: {found[case].splitlines()[0][:200]}"
        rows.append(f"| {part} | `{name}` | {verdict} | {WORTH_KNOWING.get(case, '')} |")
    return "\n".join(rows) + "\n"
