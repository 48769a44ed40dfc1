"""Models and training images that do not fit each other, or cannot be built, and the part of the config that
is named."""

import numpy as np
import pytest
import torch
from mmcv import ConfigDict
from mmcv.parallel import DataContainer
from torch import nn

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.samples import first_sample
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import ConfigError
from internseg_ds.preflight.model_checks import check_forward, check_sample
from tests.small_experiment import small_experiment

IMAGE = {"img": torch.zeros(3, 112, 112)}
AUXILIARY = dict(
    type="FCNHead",
    in_channels=32,
    channels=8,
    num_convs=1,
    concat_input=False,
    num_classes=150,
    norm_cfg=dict(type="BN"),
)


@pytest.fixture(scope="module")
def small(ade20k):
    return read_experiment(small_experiment(ade20k))


@pytest.fixture(scope="module")
def model(small):
    return build_on_meta(small.model)


def formatted(small, *steps):
    """The first training image, with `steps` in place of DefaultFormatBundle."""
    entry = ConfigDict(small.train)
    entry.pipeline = [step for step in entry.pipeline[:-1] if step["type"] != "DefaultFormatBundle"] + [
        *map(ConfigDict, steps),
        entry.pipeline[-1],
    ]
    return first_sample(build_datasets(entry, "data.train"), "data.train")


def test_an_ordinary_training_image_passes(small, model):
    check_sample(model, formatted(small, dict(type="DefaultFormatBundle")))
    stacked = [dict(key="img", stack=True), dict(key="gt_semantic_seg", stack=True)]
    sample = formatted(
        small, dict(type="ImageToTensor", keys=["img"]), dict(type="ToDataContainer", fields=stacked)
    )
    sample["gt_semantic_seg"] = DataContainer(
        torch.from_numpy(sample["gt_semantic_seg"].data[None].astype(np.int64)), stack=True
    )
    check_sample(model, sample)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], r"img of the first image .* an array of float32, \(112, 112, 3\), .*DefaultFormatBundle"),
        (
            [dict(type="ToTensor", keys=["img"])],
            r"img .* a tensor of float32, \(112, 112, 3\), and must be .* channels first",
        ),
        (
            [dict(type="ImageToTensor", keys=["img"])],
            r"gt_semantic_seg .* an array of uint8, \(112, 112\), .* int64, \(1, 112, 112\): put "
            r".*DefaultFormatBundle",
        ),
        (
            [dict(type="DefaultFormatBundle"), dict(type="ToDataContainer", fields=[dict(key="img")])],
            "img .* not stacked",
        ),
    ],
)
def test_a_training_image_that_is_no_tensor_for_the_model_is_told_the_step_that_makes_one(
    small, model, steps, words
):
    with pytest.raises(ConfigError, match=words):
        check_sample(model, formatted(small, *steps))


def test_whole_numbers_are_no_image(small, model):
    sample = formatted(small, dict(type="DefaultFormatBundle"))
    with pytest.raises(ConfigError, match=r"uint8, \(3, 112, 112\),.*float32.*Normalize"):
        check_sample(model, sample | {"img": DataContainer(sample["img"].data.to(torch.uint8), stack=True)})


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        (
            "auxiliary_head",
            [AUXILIARY, AUXILIARY | dict(in_index=9)],
            r"tuple index out of range, in model\.auxiliary_head\.1 \(FCNHead\): do its in_index=9, "
            r"in_channels=32 fit the 4 maps of 32, 32, 32, 32 channels",
        ),
        (
            "decode_head",
            AUXILIARY | dict(in_channels=31),
            r"in model\.decode_head \(FCNHead\): do its in_index=-1, in_channels=31 fit",
        ),
        (
            "neck",
            dict(type="FPN", in_channels=[32, 32, 32, 31], out_channels=32, num_outs=4),
            r"in model\.neck$",
        ),
        ("backbone", dict(type="UNet", in_channels=4), r"with 3 channels, and the backbone UNet takes 4"),
    ],
)
def test_the_part_that_cannot_take_an_image_is_named(small, part, settings, words):
    changed = ConfigDict(small.model, **{part: settings})
    with pytest.raises(ConfigError, match=words):
        check_forward(build_on_meta(changed), IMAGE, 2, 1)


def swin(frozen_stages):
    return dict(
        type="SwinTransformer",
        embed_dims=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        frozen_stages=frozen_stages,
    )


@pytest.mark.parametrize(
    "backbone",
    [
        swin(9),
        dict(type="ResNetV1c", depth=18, base_channels=8, frozen_stages=5),
        dict(type="ResNetV1c", depth=18, base_channels=8, frozen_stages="1"),
    ],
)
def test_stages_that_cannot_be_frozen_are_named(small, backbone):
    with pytest.raises(
        ConfigError,
        match=rf"model\.backbone\.frozen_stages={backbone['frozen_stages']!r}.*{backbone['type']}",
    ):
        build_on_meta(ConfigDict(small.model, backbone=backbone))


def test_stages_that_a_backbone_freezes_when_it_trains_are_frozen_before_parameters_are_grouped(small):
    built: nn.Module = build_on_meta(ConfigDict(small.model, backbone=swin(2)))
    frozen = {
        name.split(".")[2]
        for name, param in built.backbone.named_parameters()
        if name.startswith("stages") and not param.requires_grad
    }
    assert not any(param.requires_grad for param in built.backbone.patch_embed.parameters()) and frozen
