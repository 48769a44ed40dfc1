"""The head that replaces mmseg's FCNHead."""

import pytest
import torch
from mmcv import ConfigDict
from mmseg.models import build_head
from mmseg.models.builder import HEADS
from torch import nn

from internseg_ds.models import FCNHead


def head(**arguments: object) -> FCNHead:
    return build_head(
        ConfigDict(
            type="FCNHead",
            **{"in_channels": 8, "channels": 8, "num_classes": 5, "dropout_ratio": 0.0, **arguments},
        )
    )


def test_takes_the_place_of_mmsegs():
    assert HEADS.get("FCNHead") is FCNHead


def test_a_linear_probe_is_a_norm_and_a_linear_classifier():
    torch.manual_seed(0)
    probe = head(num_convs=0, concat_input=False, with_norm=True).eval()
    assert {name: tuple(param.shape) for name, param in probe.named_parameters()} == {
        "conv_seg.weight": (5, 8, 1, 1),
        "conv_seg.bias": (5,),
        "norm.weight": (8,),
        "norm.bias": (8,),
    }
    assert type(probe.norm) is nn.SyncBatchNorm
    probe.norm = nn.BatchNorm2d(8).eval()  # torch's SyncBatchNorm refuses CPU tensors
    torch.nn.init.normal_(probe.norm.running_mean)
    torch.nn.init.uniform_(probe.norm.running_var, 0.5, 2.0)
    x = torch.randn(2, 8, 4, 6)
    mean, variance = probe.norm.running_mean.view(1, -1, 1, 1), probe.norm.running_var.view(1, -1, 1, 1)
    wanted = torch.einsum(
        "kc,bchw->bkhw", probe.conv_seg.weight[:, :, 0, 0], (x - mean) / (variance + 1e-5).sqrt()
    ) + probe.conv_seg.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(probe([x]), wanted)


def test_equals_mmsegs_head_where_that_one_can():
    from mmseg.models.decode_heads.fcn_head import FCNHead as Theirs

    arguments = dict(
        in_channels=8,
        channels=6,
        num_classes=5,
        num_convs=2,
        kernel_size=3,
        dilation=2,
        concat_input=True,
        norm_cfg=dict(type="BN"),
    )
    ours, theirs = FCNHead(**arguments).eval(), Theirs(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 7)
    assert torch.equal(ours([x]), theirs([x]))


def test_the_published_auxiliary_head_has_one_convolution():
    names = {
        name
        for name, _ in head(
            num_convs=1, concat_input=False, channels=6, norm_cfg=dict(type="SyncBN")
        ).named_parameters()
    }
    assert names == {
        "convs.0.conv.weight",
        "convs.0.bn.weight",
        "convs.0.bn.bias",
        "conv_seg.weight",
        "conv_seg.bias",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_convs=-1), "num_convs=-1"),
        (dict(dilation=0), "dilation=0"),
        (dict(num_convs=0, channels=6), "num_convs=0 .*in_channels=8 .*channels=6"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FCNHead(**{"in_channels": 8, "channels": 8, "num_classes": 5, **arguments})
