"""How images of pretraining were normalised, and the warning where those of training are not."""

import json

import pytest

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.models.adapters.pretraining_images import timm_normalizations, transformers_normalizations
from internseg_ds.preflight.preflight import check
from tests.conftest import ROOT, TIMM

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
SATELLITE = ((109.65, 104.805, 75.48), (54.315, 39.78, 36.465))


def test_of_timm_all_weights_of_a_model_or_those_that_a_folder_states(tmp_path):
    assert set(timm_normalizations("vit_7b_patch16_dinov3", tmp_path / "w.pth")) == {IMAGENET, SATELLITE}
    stated = {"pretrained_cfg": {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert timm_normalizations("vit_7b_patch16_dinov3", tmp_path) == (SATELLITE,)
    assert timm_normalizations("vit_7b_patch16_dinov3", None) == ()


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"image_mean": 0.5}', '{"image_mean": [0.5], "image_std": [1]}']
)
def test_of_transformers_what_a_folder_states_if_anything(text, tmp_path):
    assert transformers_normalizations(tmp_path) == transformers_normalizations(None) == ()
    file = tmp_path / "preprocessor_config.json"
    file.write_text(text)
    assert transformers_normalizations(tmp_path) == ()
    file.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}))
    assert transformers_normalizations(tmp_path) == (((127.5,) * 3, (127.5,) * 3),)
    stated = {"image_mean": [120.0] * 3, "image_std": [60.0] * 3, "do_rescale": False}
    file.write_text(json.dumps(stated))
    assert transformers_normalizations(tmp_path) == ()


@pytest.mark.parametrize(("tag", "warns"), [("lvd1689m", False), ("sat493m", True)])
def test_other_images_than_those_of_pretraining_are_a_warning(tag, warns, ade20k, tmp_path):
    mean, std = SATELLITE if tag == "sat493m" else IMAGENET
    stated = {"mean": [value / 255 for value in mean], "std": [value / 255 for value in std]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": stated}))
    options = {"data.train.data_root": str(ade20k), "model.backbone.pretrained": str(tmp_path)}
    experiment = read_experiment(ROOT / TIMM, options)
    # goes on from a checkpoint: the weights themselves are not read
    plan = check(
        experiment, ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=False, resume_from=tmp_path
    )
    said = [warning for warning in plan.warnings if "pretrained on" in warning]
    assert len(said) == warns and all("109.65" in each and "img_norm_cfg" in each for each in said)
