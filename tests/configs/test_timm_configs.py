"""The recipes of timm's models: each builds at its full size on the meta device, trains what it says, and feeds
images as its weights were pretrained."""

from pathlib import Path

import pytest
import timm
import torch
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.optimization.parameter_groups import parameter_groups

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for folder in ("dinov3", "timm") for path in (CONFIGS / folder).glob("*.py"))
RECIPES = [path for path in FILES if not path.stem.startswith("eomt")]
# part of a file's name: (billions of parameters in the backbone, blocks, channels)
MODELS = {"vit_7b": (6.71, 40, 4096), "vit_huge_plus": (0.84, 32, 1280), "vit_5b_sapiens2": (5.07, 56, 2432)}
CLASSES = {"ade20k": 150, "cocostuff164k": 171, "cityscapes": 19, "loveda": 7}


def word(name: str, words) -> str:
    """Of `words` the only one that the file's name holds."""
    (found,) = [each for each in words if each in name]
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_and_trains_what_it_says(path):
    billions, blocks, channels = MODELS[word(path.stem, MODELS)]
    frozen = path.stem.endswith("frozen")
    experiment = read_experiment(Config.fromfile(path))
    model = build_on_meta(experiment.model)
    vit = model.backbone.model
    assert len(vit.blocks) == blocks
    assert sum(param.numel() for param in vit.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0) == (0.0 if frozen else pytest.approx(0.4))
    assert {
        param.requires_grad for param in vit.parameters() if param is not getattr(vit, "mask_token", None)
    } == {not frozen}
    assert all(param.requires_grad for param in model.decode_head.parameters())
    assert model.decode_head.num_classes == CLASSES[word(path.stem, CLASSES)]
    with torch.device("meta"):
        maps = model.backbone.train()(torch.empty(2, 3, 512, 512))
    sides = [32] if path.stem.startswith("linear") else [128, 64, 32, 16]
    assert [tuple(features.shape[1:]) for features in maps] == [(channels, side, side) for side in sides]
    assert f"{path.relative_to(CONFIGS.parent)} " in path.read_text()  # the command of its docstring
    groups = {group["name"]: group["lr"] for group in parameter_groups(model, experiment.optimizer)}
    if not frozen:
        assert groups["layer 1, decay"] == pytest.approx(4e-5 * 0.95**blocks)
        assert groups[f"layer {blocks + 1}, decay"] == pytest.approx(4e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_images_are_normalised_as_in_pretraining(path):
    experiment = read_experiment(Config.fromfile(path))
    backbone = experiment.model.backbone
    tag = Path(backbone.pretrained).name
    pretrained = timm.get_pretrained_cfg(tag)
    assert tag.split(".")[0] == backbone.model_name
    for entry in (experiment.train, experiment.val):
        for data_set in leaf_datasets(entry):
            steps = [step for step in data_set.pipeline if step["type"] in ("Normalize", "MultiScaleFlipAug")]
            steps = [inner for step in steps for inner in step.get("transforms", [step])]
            (normalize,) = [step for step in steps if step["type"] == "Normalize"]
            for key in ("mean", "std"):
                assert [value / 255 for value in normalize[key]] == pytest.approx(
                    getattr(pretrained, key), abs=1e-3
                )
