"""The recipes of transformers' models: each builds at its full size on the meta device and trains what it says."""

from pathlib import Path

import pytest
import torch
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.optimization.parameter_groups import parameter_groups

CONFIGS = Path(__file__).parents[2] / "configs" / "transformers"
# file: (billions of parameters in the backbone, blocks, channels)
RECIPES = {
    "upernet_intern_vit_6b_v2_5_504_80k_ade20k_bs16_lr4e-5": (5.536, 45, 3200),
    "upernet_intern_vit_300m_v2_5_504_80k_ade20k_bs16_lr4e-5": (0.304, 24, 1024),
}


def test_every_recipe_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_trains_what_it_says(name):
    billions, blocks, channels = RECIPES[name]
    experiment = read_experiment(Config.fromfile(CONFIGS / f"{name}.py"))
    model = build_on_meta(experiment.model)
    vit = model.backbone.model
    assert sum(param.numel() for param in vit.parameters()) / 1e9 == pytest.approx(billions, abs=0.002)
    with torch.device("meta"):
        maps = model.backbone.train()(torch.empty(2, 3, 504, 504))
    assert [tuple(features.shape[1:]) for features in maps] == [
        (channels, side, side) for side in (144, 72, 36, 18)
    ]
    groups = {group["name"]: group["lr"] for group in parameter_groups(model, experiment.optimizer)}
    assert groups["layer 1, decay"] == pytest.approx(4e-5 * 0.95**blocks)
    assert groups[f"layer {blocks + 1}, decay"] == pytest.approx(4e-5)
