"""Weights of a whole segmentor that were trained on the same classes in another order, or on others."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from mmcv import ConfigDict
from mmseg.models import build_backbone

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.datasets import build_datasets
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import ConfigError, UserError
from internseg_ds.preflight.preflight import check
from internseg_ds.preflight.starting_weights import starting_weights
from tests.conftest import ROOT
from tests.small_experiment import small_experiment


@pytest.fixture(scope="module")
def small(ade20k):
    return read_experiment(small_experiment(ade20k))


@pytest.fixture(scope="module")
def names(small):
    return list(build_datasets(small.train, "data.train").CLASSES)


@pytest.fixture(scope="module")
def weights(small, names, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "whole.pth"
    state = {
        name: torch.zeros(value.shape) for name, value in build_on_meta(small.model).state_dict().items()
    }
    torch.save({"meta": {"CLASSES": tuple(names)}, "state_dict": state}, path)
    return path


def warnings_of(small, weights, classes, may_differ=()):
    train = ConfigDict(copy.deepcopy(small.train), classes=list(classes))
    changed = replace(small, train=train, engine=replace(small.engine, weights_may_differ=may_differ))
    plan = check(
        changed, ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=False, load_from=weights
    )
    return [said for said in plan.warnings if "class" in said and str(weights) in said]


def test_the_same_classes_in_another_order_are_refused_unless_the_scores_may_differ(small, weights, names):
    assert warnings_of(small, weights, names) == []
    swapped = [names[1], names[0], *names[2:]]
    words = (
        r"the same classes in another order.*weights_may_differ=\['decode_head\.conv_seg', "
        r"'auxiliary_head\.conv_seg'\]"
    )
    with pytest.raises(ConfigError, match=words):
        warnings_of(small, weights, swapped)
    with pytest.raises(ConfigError, match=words):
        warnings_of(small, weights, swapped, ("decode_head.conv_seg",))
    (said,) = warnings_of(small, weights, swapped, ("decode_head.conv_seg", "auxiliary_head"))
    assert "those of other classes" in said


def test_other_names_for_some_classes_are_a_line(small, weights, names):
    other = replace(
        small, train=ConfigDict(small.train, type="CustomDataset", img_suffix=".jpg", seg_map_suffix=".png")
    )
    (said,) = warnings_of(other, weights, ["a wall", *names[1:]])
    assert re.search(rf"whole\.pth and data\.train.* 1 class .*: 0: {names[0]} and a wall", said)
    assert warnings_of(other, weights, names) == []


@pytest.mark.parametrize(("checkpoint", "refused"), [("other.pth", True), ("one.pth", False)])
def test_two_weight_files_of_one_backbone_are_refused(checkpoint, refused, small):
    backbone = dict(
        type="TimmBackbone",
        model_name="convnext_atto",
        pretrained="one.pth",
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    )
    with torch.device("meta"):
        whole = torch.nn.ModuleDict({"backbone": build_backbone(backbone)})
    words = "one.pth.*other.pth.*both name a weight file" if refused else "one.pth.*there is no such file"
    with pytest.raises(UserError, match=words):
        starting_weights(replace(small, model=ConfigDict(backbone=backbone)), whole, None)
