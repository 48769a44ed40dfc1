"""Arguments of other types than constructors are annotated with: each is one sentence that names the key."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from mmcv import Config, ConfigDict
from mmcv.cnn import PLUGIN_LAYERS
from mmseg.models.builder import MODELS

import internseg_ds.models.mask2former.pixel_decoder  # noqa: F401 - registers it
from internseg_ds.config.argument_types import fits, wrong_arguments, wrong_types
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import ConfigError
from tests.conftest import ROOT
from tests.distributed.test_block_hooks import VIT, model_of

TIMM = dict(type="TimmBackbone", model_name="vit_tiny_patch16_224")
HUGGING = dict(type="TransformersBackbone", config=dict(model_type="vit"))
INTERN = dict(type="InternViT6B")
IMAGE = dict(type="InternImage")


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (dict(TIMM, freeze="no"), r"model\.backbone\.freeze='no' must be True or False"),
        (dict(TIMM, with_cp=3), r"with_cp=3 must be True or False"),
        (dict(TIMM, final_norm="yes"), r"final_norm='yes' must be True or False"),
        (dict(TIMM, out_indices=3), r"out_indices=3 must be a list of whole numbers or None"),
        (dict(TIMM, out_indices=["a"]), r"out_indices=\['a'\] must be a list of whole numbers or None"),
        (dict(TIMM, model_name=5), r"model_name=5 must be a string"),
        (dict(TIMM, drop_path_rate="a"), r"drop_path_rate='a' must be a number"),
        (dict(TIMM, neck=3), r"neck=3 must be a dict\(\.\.\.\), a string or None"),
        (dict(TIMM, pretrained=7), r"pretrained=7 must be a string or None"),
        (dict(TIMM, model_args=[1]), r"model_args=\[1\] must be a dict\(\.\.\.\) or None"),
        (
            dict(TIMM, img_size="big"),
            r"img_size='big' must be a whole number, a list of 2 whole numbers or None",
        ),
        (dict(TIMM, img_size=(1, 2, 3)), r"img_size=\(1, 2, 3\) must be a whole number, a list of 2"),
        (dict(HUGGING, config=5), r"config=5 must be a dict\(\.\.\.\), a string or None"),
        (dict(HUGGING, freeze=1), r"freeze=1 must be True or False"),
        (
            dict(HUGGING, neck=dict(type="SimpleFeaturePyramid", out_channels="many")),
            r"model\.backbone\.neck\.out_channels='many' must be a whole number",
        ),
        (dict(INTERN, depth=True), r"depth=True must be a whole number"),
        (dict(INTERN, depth=4.0), r"depth=4\.0 must be a whole number"),
        (dict(IMAGE, depths=4), r"depths=4 must be a list of whole numbers"),
        (dict(type="InternViTAdapter", use_flash_attn="yes"), r"use_flash_attn='yes' must be True or False"),
        (dict(type="InternViTAdapter", interaction_indexes=3), r"must be a list of lists"),
    ],
)
def test_a_wrong_type_is_one_sentence_with_key_and_value(backbone, words):
    with pytest.raises(ConfigError, match=words) as raised:
        build_on_meta(ConfigDict(model_of("vit"), backbone=backbone))
    assert "\n" not in str(raised.value)


def test_heads_are_looked_at_too():
    head = dict(type="FCNHead", num_convs="two", in_channels=8, channels=8, num_classes=3)
    model = ConfigDict(type="EncoderDecoder", backbone=TIMM, decode_head=[dict(type="FCNHead"), head])
    assert list(wrong_arguments(model, "model")) == [
        "model.decode_head[1].num_convs='two' must be a whole number"
    ]
    head = dict(type="EoMTHead", num_classes="many", loss_cls={}, loss_mask={}, loss_dice={})
    eomt = ConfigDict(
        type="EoMT", backbone=dict(TIMM, final_norm=True), decode_head=head, test_cfg=dict(mode="whole")
    )
    with pytest.raises(ConfigError, match=r"model\.decode_head\.num_classes='many' must be a whole number"):
        build_on_meta(eomt)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, float),
        (np.int64(3), int),
        (np.float32(0.5), float),
        (np.bool_(True), bool),
        ([1, 2], tuple[int, int]),
        (np.array([1, 2]), tuple[int, ...]),
        (ConfigDict(a=1), dict | None),
        (Path("a.pth"), str | None),
    ],
)
def test_what_can_be_meant_fits(value, hint):
    assert fits(value, hint)


def test_every_argument_of_ours_is_annotated_and_its_default_fits():
    kinds = [
        kind
        for kind in {*MODELS.module_dict.values(), *PLUGIN_LAYERS.module_dict.values()}
        if isinstance(kind, type) and kind.__module__.startswith("internseg_ds.")
    ]
    assert len(kinds) > 10
    for kind in kinds:
        own = vars(kind).get("__init__")
        parameters = inspect.signature(own).parameters.values() if own else ()
        for each in parameters:
            assert each.name == "self" or each.annotation is not each.empty, (kind, each)
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        assert list(wrong_types(kind, defaults, "")) == []


def test_no_config_of_the_project_is_refused():
    paths = [path for path in ROOT.glob("configs/**/*.py") if "_base_" not in path.parts]
    assert len(paths) > 10
    for path in paths:
        assert list(wrong_arguments(Config.fromfile(str(path)).model, "model")) == [], path


@pytest.mark.parametrize(
    ("part", "settings", "near"),
    [
        ("backbone", dict(type="TimBackbone"), "TimmBackbone"),
        ("neck", dict(type="SimpleFeaturePiramid"), "SimpleFeaturePyramid"),
        ("decode_head", dict(type="UperHead"), "UPerHead"),
        ("backbone", dict(TIMM, neck="SimpelFeaturePyramid"), "SimpleFeaturePyramid"),
    ],
)
def test_a_type_that_nobody_has_is_answered_with_the_nearest(part, settings, near):
    model = ConfigDict(model_of("vit"), backbone=VIT)
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        build_on_meta(ConfigDict(model, **{part: settings}))
