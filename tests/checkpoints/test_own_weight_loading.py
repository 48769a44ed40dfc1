"""Files that mmseg's backbones read in their own way: classifiers beside them, tables of another window,
other layouts."""

import pytest
import torch
from mmcv import ConfigDict
from mmseg.models import build_backbone

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.initial_values import initialise
from internseg_ds.distributed.weight_loading import load
from internseg_ds.errors import CheckpointError
from internseg_ds.models.beit import resize_bias_table
from internseg_ds.preflight.starting_weights import starting_weights
from tests.conftest import ROOT, TINY

SWIN = dict(
    type="SwinTransformer",
    embed_dims=8,
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_size=7,
    patch_norm=True,
    pretrain_img_size=32,
)
BEIT = dict(
    type="BEiT",
    img_size=64,
    patch_size=16,
    embed_dims=8,
    num_layers=3,
    num_heads=2,
    qv_bias=True,
    init_values=0.1,
    out_indices=[2],
)
RESNET = dict(type="ResNet", depth=18, base_channels=4, num_stages=4)


def experiment_of(backbone, file):
    experiment = read_experiment(ROOT / TINY)
    channels = (
        backbone.get("embed_dims", 8) * (8 if backbone["type"].startswith("Swin") else 1)
        if backbone["type"] != "ResNet"
        else 32
    )
    head = dict(type="FCNHead", in_channels=channels, in_index=-1, channels=4, num_classes=150)
    experiment.model.clear()
    experiment.model.update(
        ConfigDict(
            type="EncoderDecoder",
            decode_head=head,
            test_cfg=dict(mode="whole"),
            train_cfg={},
            backbone={**backbone, "init_cfg": dict(type="Pretrained", checkpoint=str(file))},
        )
    )
    return experiment


def loaded(backbone, file):
    """The backbone's state with what a run would start from, and the names that were not in the file."""
    from mmseg.models import build_segmentor

    experiment = experiment_of(backbone, file)
    found = starting_weights(experiment, build_on_meta(experiment.model), None)
    experiment.model.backbone.pop("init_cfg")
    model = build_segmentor(experiment.model)
    initialise(model, 0, torch.float32)
    load(model, found)
    return model.backbone.state_dict(), found


def random_state(backbone, seed=0):
    torch.manual_seed(seed)
    built = build_backbone(dict(backbone))
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in built.state_dict().items()
    }


def test_a_classifier_beside_a_backbone_is_passed_over(tmp_path):
    state = random_state(RESNET)
    torch.save(state | {"fc.weight": torch.ones(10, 32), "fc.bias": torch.ones(10)}, tmp_path / "w.pth")
    found, fit = loaded(RESNET, tmp_path / "w.pth")
    assert all(torch.equal(found[name], state[name]) for name in state) and sorted(fit.ignored) == [
        "fc.bias",
        "fc.weight",
    ]


def test_a_swin_of_another_window_is_read_as_mmseg_reads_it(tmp_path):
    state = random_state(SWIN | {"window_size": 5})
    given = {name: value for name, value in state.items() if not name.startswith("norm")} | {
        "head.weight": torch.ones(3, 64)
    }
    torch.save({"model": given}, tmp_path / "w.pth")
    theirs = build_backbone(SWIN | {"init_cfg": dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"))})
    theirs.init_weights()
    found, fit = loaded(SWIN, tmp_path / "w.pth")
    expected = theirs.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected if not name.startswith("norm"))
    table = "stages.0.blocks.0.attn.w_msa.relative_position_bias_table"
    assert found[table].shape == (169, 1) and state[table].shape == (81, 1) and found[table].any()
    assert (
        all(name.startswith("norm") for name in fit.missing if not name.endswith("relative_position_index"))
        and "norm3.weight" in fit.missing
    )


def test_a_beit_of_the_same_size_is_read_as_mmseg_reads_it(tmp_path):
    state = random_state(BEIT)
    given = {("backbone." + name): value for name, value in state.items()} | {"head.weight": torch.ones(3, 8)}
    torch.save({"state_dict": given}, tmp_path / "w.pth")
    found, _ = loaded(BEIT, tmp_path / "w.pth")
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["BEiT", "MAE"])
def test_a_beit_of_another_image_size_gets_its_tables_resized(tmp_path, kind):
    backbone = {**BEIT, "type": kind, "img_size": 128}
    if kind == "MAE":
        backbone.pop("qv_bias")
    state = {
        name: value
        for name, value in random_state(backbone | {"img_size": 64}).items()
        if not name.endswith("relative_position_index")
    }
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    found, _ = loaded(backbone, tmp_path / "w.pth")
    resized = [name for name in state if state[name].shape != found[name].shape]
    assert {name.rpartition(".")[2] for name in resized} <= {
        "relative_position_bias_table",
        "pos_embed",
    } and len(resized) >= 3
    for name in set(state) - set(resized):
        assert torch.equal(found[name], state[name]), name
    for name in resized:
        if name.endswith("table"):  # 7 x 7 positions, and 3 entries of their own
            assert found[name].shape == (228, 2) and torch.equal(found[name][-3:], state[name][-3:])
            torch.testing.assert_close(found[name][:-3], resize_bias_table(state[name][:-3], 15))


def test_where_mmsegs_own_way_fails_its_reason_is_told(tmp_path):
    torch.save({"state_dict": random_state(BEIT | {"embed_dims": 12})}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the model"):
        loaded(BEIT, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "state", [{"other.weight": torch.ones(3)}, {"patch_embed.projection.weight": torch.ones(8, 3, 4, 4)}]
)
def test_a_file_of_which_hardly_anything_is_taken_is_refused_in_the_words_of_its_names(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="unexpected in the file"):
        loaded(SWIN, tmp_path / "w.pth")


def test_a_backbone_inside_a_backbone_starts_from_its_file(tmp_path):
    inner = dict(RESNET, base_channels=64, stem_channels=64)
    outer = dict(
        type="BiSeNetV1",
        context_channels=(4, 8, 16),
        spatial_channels=(4, 4, 4, 8),
        out_channels=8,
        backbone_cfg=inner,
    )
    state = random_state(inner)
    torch.save(state | {"fc.weight": torch.ones(10, 512)}, tmp_path / "w.pth")
    experiment = read_experiment(ROOT / TINY)
    experiment.model.backbone = ConfigDict(
        outer, backbone_cfg=dict(inner, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth")))
    )
    experiment.model.decode_head = ConfigDict(
        type="FCNHead", in_channels=8, in_index=0, channels=4, num_classes=150
    )
    experiment.model.auxiliary_head = None
    model = build_on_meta(experiment.model)
    found = starting_weights(experiment, model, None)
    assert found.ignored == ["fc.weight"] and {
        f"backbone.context_path.backbone.{name}" for name in state
    } == set(found.sources)
    torch.save({"other": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        starting_weights(experiment, model, None)
