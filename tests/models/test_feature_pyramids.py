"""Necks for plain transformers: scales, channels, and the published layers."""

import pytest
import torch
from mmcv import ConfigDict
from mmseg.models.builder import build_neck
from torch import nn

from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B


def maps(width: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, width, 6, 5) for _ in range(4)]


def test_the_neck_is_intern_vits_pyramid():
    neck = build_neck(ConfigDict(type="ViTFeaturePyramid", in_channels=[8] * 4, with_norm=True))
    vit = InternViT6B(
        embed_dim=8,
        depth=4,
        num_heads=2,
        img_size=28,
        out_indices=(0, 1, 2, 3),
        with_fpn=True,
        with_final_norm=True,
    )
    theirs = [vit.up1, vit.up2, vit.up3, vit.up4]
    nn.ModuleList(theirs).load_state_dict(neck.stages.state_dict())
    found = neck(maps())
    assert [tuple(x.shape[2:]) for x in found] == [(24, 20), (12, 10), (6, 5), (3, 2)]
    assert all(torch.equal(ours, up(x)) for ours, up, x in zip(found, theirs, maps()))


def test_the_simple_pyramid_comes_from_the_last_map_alone():
    neck = build_neck(ConfigDict(type="SimpleFeaturePyramid", in_channels=[8] * 4, out_channels=12))
    found = neck(maps())
    assert [tuple(x.shape[1:]) for x in found] == [(12, 24, 20), (12, 12, 10), (12, 6, 5), (12, 3, 2)]
    others = [torch.zeros(2, 8, 6, 5)] * 3 + maps()[3:]
    assert all(torch.equal(ours, again) for ours, again in zip(found, neck(others)))
    # the scale of the patch grid is a plain 1 x 1 and a 3 x 3 convolution with norms of the channels
    one, first, three, second = neck.stages[2]
    x = nn.functional.conv2d(maps()[3], one.weight).movedim(1, -1)
    x = nn.functional.layer_norm(x, (12,), first.weight, first.bias, 1e-6).movedim(-1, 1)
    x = nn.functional.conv2d(x, three.weight, padding=1).movedim(1, -1)
    x = nn.functional.layer_norm(x, (12,), second.weight, second.bias, 1e-6).movedim(-1, 1)
    assert torch.allclose(found[2], x, atol=1e-5)


def test_maps_of_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"\[8, 16, 32, 64\]"):
        build_neck(ConfigDict(type="ViTFeaturePyramid", in_channels=[8, 16, 32, 64]))


@pytest.mark.parametrize(
    ("neck", "channels"),
    [("ViTFeaturePyramid", 48), (dict(type="SimpleFeaturePyramid", out_channels=12), 12)],
)
def test_a_backbone_computes_its_neck(neck, channels):
    from mmseg.models import build_backbone

    settings = dict(embed_dim=48, depth=4, num_heads=3)
    model = build_backbone(
        ConfigDict(
            type="TimmBackbone",
            model_name="vit_small_patch16_dinov3",
            model_args=settings,
            neck=neck,
            freeze=True,
        )
    )
    found = model(torch.randn(1, 3, 48, 64))
    assert [tuple(x.shape[1:]) for x in found] == [
        (channels, 12, 16),
        (channels, 6, 8),
        (channels, 3, 4),
        (channels, 1, 2),
    ]
    assert model.channels == (channels,) * 4 and model.layer_id("neck.stages.0.0.weight") == 5
    assert all(param.requires_grad == name.startswith("neck.") for name, param in model.named_parameters())
