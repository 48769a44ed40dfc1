"""What the checks find in a model's forward pass, and the config that a checked run saves."""

import json
import shutil

import pytest
import transformers
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import World
from internseg_ds.preflight.preflight import check
from tests.conftest import ROOT
from tests.small_experiment import small_experiment


@pytest.mark.parametrize(
    ("classes", "unknown"),
    [
        ("auto", None),
        (["Block"], None),
        (["internseg_ds.models.intern_vit.intern_vit_6b.Block"], None),
        (["internseg_ds.models.intern_vit_6b.Block", "Block"], "internseg_ds.models.intern_vit_6b.Block"),
    ],
)
def test_leaf_classes_that_the_model_does_not_have_are_a_note(classes, unknown, ade20k):
    ds_config = json.loads((ROOT / "ds_configs/zero3_bf16.json").read_text())
    leaf_module = classes if classes == "auto" else {"classes": classes}
    ds_config["zero_optimization"]["leaf_module"] = leaf_module
    plan = check(read_experiment(small_experiment(ade20k)), ds_config, World(0, 2, 0), validate=False)
    said = [note for note in plan.notes if "leaf_module.classes" in note]
    assert [unknown in note for note in said] == [True] * (unknown is not None)


def test_epochs_become_steps_of_the_data_and_the_batch(ade20k):
    epochs = dict(_delete_=True, type="EpochBasedRunner", max_epochs=6)
    experiment = read_experiment(small_experiment(ade20k), {"runner": epochs, "evaluation.interval": 2})
    plan = check(experiment, ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=False)
    length = len(plan.train_set) // plan.ds.global_batch
    assert length > 1 and plan.experiment.max_steps == 6 * length
    assert plan.experiment.evaluation.interval == 2 * length
    assert any(f"an epoch is {length} steps" in note for note in plan.experiment.notes)


def test_a_saved_config_builds_the_model_whose_folder_is_gone(ade20k, tmp_path):
    fields = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    folder = tmp_path / "published"
    transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**fields)).save_pretrained(folder)
    cfg = small_experiment(ade20k)
    cfg.model.backbone = dict(type="TransformersBackbone", pretrained=str(folder))
    cfg.optimizer.paramwise_cfg.num_layers = 4
    plan = check(read_experiment(cfg), ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=False)
    assert plan.weights is not None and len(plan.weights.sources) > 60 and not plan.weights.missing
    shutil.rmtree(folder)
    again = build_on_meta(Config.fromstring(plan.config_text, ".py").model)
    expected = {name: param.shape for name, param in plan.meta_model.named_parameters()}
    assert {name: param.shape for name, param in again.named_parameters()} == expected


def test_what_a_librarys_model_leaves_out_and_does_not_train_is_a_line(ade20k):
    cfg = small_experiment(ade20k)
    fields = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    config = dict(model_type="dinov3_vit", **fields)
    cfg.model.backbone = dict(type="TransformersBackbone", config=config, out_indices=[0, 1, 2])
    cfg.model.decode_head.update(in_channels=[32] * 3, in_index=[0, 1, 2])
    cfg.model.auxiliary_head.update(in_channels=32)
    cfg.optimizer.paramwise_cfg.num_layers = 3
    plan = check(read_experiment(cfg), ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=False)
    (left_out,) = [note for note in plan.notes if "no feature map depends on" in note]
    assert "rope" not in left_out  # its buffer is used
    assert "layer.3." in left_out and "not built" in left_out
    (stays,) = [note for note in plan.notes if "no gradient reaches" in note]
    assert "mask_token" in stays and "model.norm.weight, model.norm.bias of the backbone" in stays
