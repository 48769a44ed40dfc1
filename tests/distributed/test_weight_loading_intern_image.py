"""Published classification weights of InternImage, in every wrapping, into backbones whole and
partitioned."""

import dataclasses
from pathlib import Path

import deepspeed
import pytest
import torch
from mmcv import Config, ConfigDict
from torch import Tensor

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_for_training, build_on_meta
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.weight_loading import load, match_backbone
from internseg_ds.errors import CheckpointError
from internseg_ds.preflight.starting_weights import starting_weights
from tests.conftest import IMAGE, ROOT
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import ds_config
from tests.distributed.test_weight_loading import loaded

HEADS = {
    "conv_head.0.weight": (6, 64, 1, 1),
    "conv_head.1.0.running_mean": (6,),
    "head.weight": (3, 6),
    "dcnv3_head_x4.0.weight": (8, 64, 1, 1),
    "dcnv3_head_x3.bias": (2,),
    "clip_projector.cross_dcn.q_bias": (2,),
    "fc_norm.0.weight": (2,),
}
"""What stands beside the backbone: of T to XL the first three, of H and G the others too."""
WRAPPED = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "meta": {}},
    "module.": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    "backbone.": lambda state: {
        "state_dict": {f"backbone.{name}": value for name, value in state.items()}
        | {"decode_head.conv_seg.bias": torch.ones(3)}
    },
    "module.backbone.": lambda state: {f"module.backbone.{name}": value for name, value in state.items()},
}


def segmentor() -> ConfigDict:
    model = Config.fromfile(ROOT / IMAGE).model
    model.backbone.update(
        channels=8, depths=[1, 1, 2, 1], groups=[1, 2, 4, 4], level2_post_norm_block_ids=[0]
    )
    model.decode_head.update(in_channels=[8, 16, 32, 64], channels=15)
    model.auxiliary_head.update(in_channels=32, channels=15)
    return model


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    model = build_for_training(segmentor(), ds_config(1, bf16=False), torch.device("cpu"), seed=7)
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in model.backbone.state_dict().items()}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_every_wrapping_loads_and_classifiers_are_left_aside_by_name(wrapping, state, tmp_path):
    heads = {name: torch.ones(shape) for name, shape in HEADS.items()}
    torch.save(WRAPPED[wrapping](state | heads), tmp_path / "w.pth")
    found = loaded(segmentor(), tmp_path / "w.pth").backbone.state_dict()
    assert found.keys() == state.keys() and all(
        torch.equal(found[name], value) for name, value in state.items()
    )


def test_other_names_and_shapes_are_refused(state, tmp_path):
    model = build_on_meta(segmentor())
    torch.save(state | {"levels.4.norm.0.weight": torch.ones(2)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"unexpected in the file: levels\.4\.norm\.0\.weight"):
        match_backbone(model, open_weights(tmp_path / "more.pth"))
    torch.save(state | {"levels.0.blocks.0.dcn.mask.bias": torch.ones(18)}, tmp_path / "wider.pth")
    with pytest.raises(CheckpointError, match=r"dcn\.mask\.bias is \[18\] .* \[9\]"):
        match_backbone(model, open_weights(tmp_path / "wider.pth"))


def shares_are_read_and_no_more(path: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    world = torch.distributed.get_world_size()
    model = build_for_training(
        segmentor(), ds_config(3, world_size=world, bf16=False), torch.device("cpu"), seed=0
    )
    weights, read = open_weights(path), []

    def counted(name: str, start: int, stop: int) -> Tensor:
        read.append(stop - start)
        return weights.read_slice(name, start, stop)

    load(model, match_backbone(model, dataclasses.replace(weights, read_slice=counted)))
    assert sum(read) <= sum(shape.numel() for shape in weights.shapes.values()) / world + len(weights.shapes)
    expected = torch.load(path)["model"]
    params = dict(model.backbone.named_parameters())
    assert params.keys() == expected.keys()
    with gathered(list(params.values())):
        assert all(torch.equal(param.data, expected[name]) for name, param in params.items())


def test_each_rank_of_zero3_reads_its_own_share(state, tmp_path):
    torch.save({"model": state}, tmp_path / "w.pth")
    spawn(shares_are_read_and_no_more, 2, tmp_path / "w.pth")


INIT_CFG = "model.backbone.init_cfg.checkpoint"


@pytest.mark.parametrize("setting", [INIT_CFG, "model.pretrained", "model.backbone.pretrained", "load_from"])
def test_an_address_is_answered_with_what_to_do(setting):
    experiment = read_experiment(ROOT / IMAGE, {setting: "https://somewhere.org/w.pth"})
    with pytest.raises(
        CheckpointError,
        match=f"^{setting}='https://somewhere.org/w.pth'.*--cfg-options {setting}=PATH, .* {setting}=None$",
    ):
        starting_weights(experiment, build_on_meta(experiment.model), None)


def test_the_file_of_init_cfg_is_what_a_run_starts_from_and_not_the_resnet_of_a_base_config():
    experiment = read_experiment(ROOT / IMAGE, {"model.pretrained": "open-mmlab://resnet50_v1c"})
    assert starting_weights(experiment, build_on_meta(experiment.model), None) is None
    experiment = read_experiment(
        ROOT / IMAGE, {"model.pretrained": "open-mmlab://resnet50_v1c", INIT_CFG: "nowhere.pth"}
    )
    with pytest.raises(CheckpointError, match=f"^{INIT_CFG}='nowhere.pth': .*no such file"):
        starting_weights(experiment, build_on_meta(experiment.model), None)
