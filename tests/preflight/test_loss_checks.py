"""Labels for "no class", which data set, padding, heads and losses must agree on."""

import re

import pytest
from mmseg.models import build_head
from torch import nn

from internseg_ds.data.datasets import build_datasets
from internseg_ds.errors import ConfigError, DataError
from internseg_ds.preflight.loss_checks import check_losses

CROSS_ENTROPY = dict(type="CrossEntropyLoss")


def said_of(classes, *, pad=None, ignored=255, loss=CROSS_ENTROPY, wrapped=False, **head):
    settings = dict(
        type="FCNHead",
        in_channels=4,
        channels=4,
        num_convs=1,
        concat_input=False,
        num_classes=classes,
        loss_decode=loss,
    )
    train = dict(
        type="CustomDataset",
        pipeline=[dict(type="Pad", size=(8, 8), **({} if pad is None else dict(seg_pad_val=pad)))],
    )
    return check_losses(
        nn.ModuleDict({"decode_head": build_head(settings | head)}),
        dict(type="ConcatDataset", datasets=[train]) if wrapped else train,
        [ignored],
        "a config",
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(classes=150),
        dict(classes=300, ignored=65535, ignore_index=65535, pad=65535),
        dict(classes=3, loss=dict(type="DiceLoss", ignore_index=0)),
        dict(
            classes=300,
            ignored=65535,
            ignore_index=65535,
            pad=65535,
            loss=dict(type="DiceLoss", ignore_index=65535),
        ),
    ],
    ids=str,
)
def test_what_agrees_passes_in_silence(settings):
    assert said_of(**settings) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            dict(classes=300, ignored=65535, ignore_index=65535),
            "Pad.seg_pad_val of its pipeline is 255 .* is class 255 of the 300 classes",
        ),
        (
            dict(classes=300, ignored=65535, ignore_index=65535, pad=65535, loss=dict(type="DiceLoss")),
            "its DiceLoss is 255",
        ),
        (
            dict(classes=2, loss=CROSS_ENTROPY | dict(class_weight=[1.0, -1.0])),
            "must be numbers of at least 0, and not all 0",
        ),
        (
            dict(classes=2, loss=CROSS_ENTROPY | dict(class_weight=[0.0, 0.0])),
            "must be numbers of at least 0, and not all 0",
        ),
        (dict(classes=1, loss=CROSS_ENTROPY | dict(use_sigmoid=True)), r"num_classes=1.* num_classes=2"),
        (dict(classes=150, pad=254), "seg_pad_val of its pipeline is 254"),
        (dict(classes=150, pad=254, wrapped=True), "seg_pad_val of its pipeline is 254"),
    ],
    ids=str,
)
def test_what_does_not_agree_is_an_error(settings, words):
    with pytest.raises(ConfigError, match=words):
        said_of(**settings)


def test_padding_that_is_a_class_is_said():
    (said,) = said_of(150, pad=0)
    assert re.fullmatch(r"Pad\.seg_pad_val.* 0, .*model\.decode_head .*class 0, .*ignore_index is 255", said)


def test_classes_that_are_left_out_may_not_become_one_that_is_kept(ade20k):
    entry = dict(
        type="ADE20KDataset",
        data_root=str(ade20k),
        img_dir="images/training",
        ann_dir="annotations/training",
        pipeline=[],
        classes=["wall", "sky"],
        ignore_index=0,
    )
    with pytest.raises(DataError, match=r"ignore_index=0 .*\(wall\)"):
        build_datasets(entry, "data.train")
    entry["ignore_index"] = 255
    assert build_datasets(entry, "data.train").CLASSES == ["wall", "sky"]
