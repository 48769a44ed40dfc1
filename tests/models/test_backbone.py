"""What the engine reads of backbones that it has never heard of: here mmseg's own."""

import pytest
import torch
from mmcv import ConfigDict
from mmseg.models import build_backbone

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_for_training, build_on_meta
from internseg_ds.distributed.weight_loading import load, match_segmentor
from internseg_ds.errors import CheckpointError, ConfigError
from internseg_ds.evaluation.inference import load_trained
from internseg_ds.models.backbone import patch_size, pretrained_file, vector_length
from internseg_ds.preflight.starting_weights import starting_weights
from tests.conftest import TINY

VIT = dict(
    type="VisionTransformer",
    img_size=(32, 32),
    patch_size=16,
    embed_dims=16,
    num_layers=2,
    num_heads=2,
    out_indices=(0, 1, 0, 1),
    drop_path_rate=0.2,
)


@pytest.mark.parametrize(
    ("arguments", "patch", "length"),
    [
        (VIT, 16, 16),
        (dict(type="SwinTransformer", embed_dims=24, depths=(1, 1, 4, 1), num_heads=(1, 2, 4, 8)), 1, 96),
        (dict(type="ResNetV1c", depth=18), 1, 512),
        (dict(type="InternViT6B", img_size=28, embed_dim=24, depth=1, num_heads=2, out_indices=[0]), 14, 24),
    ],
)
def test_patches_and_widths_are_told_without_a_name(arguments, patch, length):
    backbone = build_backbone(arguments)
    assert (patch_size(backbone), vector_length(backbone)) == (patch, length)


def test_a_patch_that_is_no_square_asks_for_multiples_of_both_sides():
    backbone = torch.nn.Module()
    backbone.patch_size = (4, 6)
    assert patch_size(backbone) == 12


@pytest.mark.parametrize(
    "kind", ["VisionTransformer", "SwinTransformer", "MixVisionTransformer", "BEiT", "MAE", "PCPVT", "SVT"]
)
def test_backbones_that_count_their_drop_path_rates_with_a_tensor_are_built_on_the_meta_device(kind):
    experiment = read_experiment(TINY)
    segmentor = build_on_meta(ConfigDict({**experiment.model, "backbone": dict(type=kind)}))
    assert {tensor.device.type for tensor in segmentor.state_dict().values()} == {"meta"}


def vit_experiment(**arguments):
    experiment = read_experiment(
        TINY, {"model.decode_head.in_channels": [16] * 4, "model.auxiliary_head.in_channels": 16}
    )
    experiment.model.backbone = ConfigDict({**VIT, **arguments})
    return experiment


def build(experiment):
    ds = resolve_ds_config(
        {"zero_optimization": {"stage": 1}},
        experiment=experiment.path,
        micro_batch=1,
        world_size=1,
        optimizer=experiment.optimizer,
    )
    return build_for_training(experiment.model, ds, torch.device("cpu"), seed=0)


@pytest.mark.parametrize("how", ["pretrained", "init_cfg"])
def test_mmsegs_two_ways_to_name_weights_are_read_by_the_engine_and_not_by_the_module(how, tmp_path):
    path = tmp_path / "vit.pth"
    arguments = (
        {"pretrained": str(path)}
        if how == "pretrained"
        else {"init_cfg": dict(type="Pretrained", checkpoint=str(path))}
    )
    experiment = vit_experiment(**arguments)
    hollow = build_on_meta(experiment.model)
    assert pretrained_file(hollow.backbone) == str(path)
    with pytest.raises(CheckpointError, match=rf"model\.backbone\.{how}"):
        starting_weights(experiment, hollow, None)
    model = build(experiment)  # reads no file: there is none
    wanted = {name: torch.randn_like(value) for name, value in model.backbone.state_dict().items()}
    torch.save({"state_dict": wanted}, path)
    load(model, starting_weights(experiment, hollow, None))
    assert all(torch.equal(value, wanted[name]) for name, value in model.backbone.state_dict().items())


def test_finished_weights_that_are_nan_are_refused_by_whoever_only_segments_with_them(tmp_path):
    experiment = vit_experiment()
    state = build(experiment).state_dict()
    torch.save(state, tmp_path / "w.pth")
    load_trained(experiment, tmp_path / "w.pth", torch.device("cpu"))
    state["decode_head.conv_seg.bias"][0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"decode_head\.conv_seg\.bias .*NaN"):
        load_trained(experiment, tmp_path / "w.pth", torch.device("cpu"))


def test_weights_of_a_head_alone_are_refused():
    experiment = vit_experiment()
    experiment.model.decode_head.init_cfg = dict(type="Pretrained", checkpoint="head.pth")
    with pytest.raises(ConfigError, match=r"model.decode_head.init_cfg .* load_from=PATH"):
        starting_weights(experiment, build_on_meta(experiment.model), None)


def test_other_classes_in_a_file_keep_the_heads_initial_values_where_they_may_differ(tmp_path):
    model = build(vit_experiment())
    state = model.state_dict()
    torch.save(
        {
            "state_dict": {
                **state,
                "decode_head.conv_seg.weight": torch.zeros(
                    19, *state["decode_head.conv_seg.weight"].shape[1:]
                ),
            }
        },
        tmp_path / "other.pth",
    )
    weights = open_weights(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="weights_may_differ"):
        match_segmentor(model, weights, ())
    with pytest.raises(CheckpointError, match=r"conv_seg.* were made with$"):
        match_segmentor(model, weights)  # for a test or a resume, which have no such setting
    found = match_segmentor(model, weights, ("decode_head.conv_seg.",))
    assert found.missing == ["decode_head.conv_seg.weight"] == found.ignored
