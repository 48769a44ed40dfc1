"""transformers' models under ZeRO-3: initial values and features as of a whole model, weights from sharded
folders of transformers."""

import json
from pathlib import Path

import deepspeed
import pytest
import timm
import torch
import transformers
from mmcv import Config, ConfigDict
from mmseg.models import build_backbone
from safetensors.torch import load_file, save_file

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.distributed.construction import build_for_training, build_on_meta
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.weight_loading import load, match_backbone
from internseg_ds.errors import CheckpointError, ConfigError
from tests.conftest import ROOT, TRANSFORMERS
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import ds_config

SMALL = dict(hidden_size=64, num_hidden_layers=5, num_attention_heads=4)
FAMILIES = {
    "siglip": dict(SMALL, model_type="siglip_vision_model", intermediate_size=128, image_size=64),
    # queries, keys and values, and the two halves of its MLP, are one tensor each in files
    "sapiens2": dict(SMALL, model_type="sapiens2", intermediate_size=128, num_register_tokens=2),
}


def segmentor(family: str, **backbone) -> Config:
    model = Config.fromfile(ROOT / TRANSFORMERS).model
    model.backbone.config = ConfigDict(FAMILIES[family])
    model.backbone.drop_path_rate = 0
    model.backbone.update(backbone)
    return model


def published(family: str, folder: Path, **more) -> Path:
    """A sharded folder as transformers writes it."""
    torch.manual_seed(3)
    fields = FAMILIES[family] | more
    config = transformers.CONFIG_MAPPING[fields["model_type"]](**fields)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def whole_and_partitioned_are_equal(folders: dict[str, Path]) -> None:
    deepspeed.init_distributed(verbose=False)
    cpu = torch.device("cpu")
    for family, folder in folders.items():
        plain = build_for_training(segmentor(family), ds_config(1, bf16=False), cpu, 0)
        ds = ds_config(3, world_size=2, bf16=False)
        ds.raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        model = build_for_training(segmentor(family), ds, cpu, 0)
        largest = max(model.backbone.parameters(), key=lambda param: param.ds_numel)
        assert largest.numel() == 0  # really partitioned
        for (name, param), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            with gathered([param]):
                assert torch.equal(param.data, expected), name
        for either in (plain, model):
            load(either, match_backbone(either, open_weights(folder)))
        engine, *_ = deepspeed.initialize(model=model, config=ds.raw)
        image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = engine.module.backbone.eval()(image)
            for ours, its in zip(found, plain.backbone.eval()(image), strict=True):
                torch.testing.assert_close(ours, its)


def test_zero3_starts_from_the_values_of_a_whole_model_and_reads_its_shards(tmp_path):
    folders = {family: published(family, tmp_path / family) for family in FAMILIES}
    assert all(len(list(folder.glob("*.safetensors"))) > 1 for folder in folders.values())
    spawn(whole_and_partitioned_are_equal, 2, folders)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_transformers_reads(family, tmp_path):
    folder = published(family, tmp_path)
    kind = build_for_training(
        segmentor(family, pretrained=str(folder)), ds_config(1, bf16=False), torch.device("cpu"), 0
    )
    found = match_backbone(kind, open_weights(folder))
    assert not found.missing and {name.split(".")[1] for name in found.ignored} <= {
        "encoder",
        "head",
        "model",
    }
    load(kind, found)
    expected = transformers.AutoModel.from_pretrained(folder).state_dict()
    state = kind.backbone.model.state_dict()
    assert state and all(torch.equal(value, expected[name]) for name, value in state.items())


def in_a_larger_model(folder: Path, prefix: str) -> Path:
    """The weights of a folder as a model of images and text has them."""
    state = {f"{prefix}{name}": value for name, value in transformers_state(folder).items()}
    state["language_model.layers.0.mlp.weight"] = torch.zeros(2, 2)
    file = folder / "larger" / "model.safetensors"
    file.parent.mkdir()
    save_file(state, file)
    vision = json.loads((folder / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    return file.parent


def transformers_state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    "prefix", ["vision_model.", "model.vision_tower.", "model.vision_tower.vision_model."]
)
def test_the_vision_tower_of_a_larger_model_is_read(prefix, tmp_path):
    folder = published("siglip", tmp_path, image_size=96)
    larger = in_a_larger_model(folder, prefix)
    model = segmentor("siglip", pretrained=str(larger), out_indices=(0, 1, 2, 3))
    model.backbone.config = dict(image_size=64)
    built = build_for_training(model, ds_config(1, bf16=False), torch.device("cpu"), 0)
    found = match_backbone(built, open_weights(larger))
    assert found.resized == ["model.embeddings.position_embedding.weight"] and not found.missing
    load(built, found)
    weight = built.backbone.model.encoder.layers[3].mlp.fc1.weight
    assert torch.equal(weight, transformers_state(folder)["encoder.layers.3.mlp.fc1.weight"])


def test_a_folder_that_is_of_another_configuration_is_refused(tmp_path):
    folder = published("siglip", tmp_path)
    model = segmentor("siglip", pretrained=str(folder))
    model.backbone.config.num_attention_heads = 2
    with pytest.raises(
        CheckpointError, match=r"--cfg-options model\.backbone\.config\.num_attention_heads=4"
    ):
        match_backbone(build_on_meta(model), open_weights(folder))


def timm_file(folder: Path) -> Path:
    model = timm.create_model("vit_small_patch16_dinov3", embed_dim=48, depth=4, num_heads=3)
    torch.save(model.state_dict(), folder / "timm.pth")
    return folder / "timm.pth"


def timm_folder(folder: Path) -> Path:
    """As timm's pages on the hub have it."""
    save_file(torch.load(timm_file(folder), weights_only=True), folder / "model.safetensors")
    config = {"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": {"tag": "lvd1689m"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def transformers_folder(folder: Path) -> Path:
    return published("siglip", folder)


def opengvlab_file(folder: Path) -> Path:
    model = build_backbone(ConfigDict(INTERN))
    names, _ = model.exported("opengvlab")
    state = model.state_dict()
    found = {theirs[0]: state[ours] for ours, theirs in names.items() if ours in state}
    save_file(found, folder / "intern.safetensors")
    return folder / "intern.safetensors"


INTERN = dict(
    type="InternViT6B", embed_dim=32, num_heads=2, depth=4, out_indices=(0, 1, 2, 3), use_flash_attn=False
)
BACKBONES = {
    "timm": dict(type="TimmBackbone", model_name="vit_small_patch16_dinov3"),
    "transformers": dict(type="TransformersBackbone", config=FAMILIES["siglip"]),
    "InternViT": INTERN,
}


@pytest.mark.parametrize(
    ("backbone", "write", "reader"),
    [
        ("timm", transformers_folder, 'dict(type="TransformersBackbone"'),
        ("InternViT", transformers_folder, 'dict(type="TransformersBackbone"'),
        ("transformers", timm_file, 'dict(type="TimmBackbone", model_name=NAME'),
        ("transformers", timm_folder, 'dict(type="TimmBackbone", model_name="vit_small_patch16_dinov3"'),
        ("InternViT", timm_file, 'dict(type="TimmBackbone"'),
        ("timm", opengvlab_file, 'dict(type="InternViT6B"'),
        ("transformers", opengvlab_file, 'dict(type="InternViT6B"'),
        ("timm", timm_file, None),  # of another size: no other backbone would help
        ("transformers", lambda folder: published("siglip", folder, hidden_size=32), None),
    ],
)
def test_a_file_in_the_layout_of_another_backbone_names_it(backbone, write, reader, tmp_path):
    model = segmentor("siglip")
    model.backbone = ConfigDict(BACKBONES[backbone])
    with pytest.raises(CheckpointError) as error:
        match_backbone(build_on_meta(model), open_weights(write(tmp_path)))
    if reader is None:
        assert "another backbone: model.backbone" not in str(error.value)
    else:
        assert f"read by another backbone: model.backbone={reader}" in str(error.value)


def test_timms_folder_is_told_from_its_config_alone(tmp_path):
    model = segmentor("siglip", pretrained=str(timm_folder(tmp_path)))
    del model.backbone.config
    with pytest.raises(ConfigError, match='type="TimmBackbone", model_name="vit_small_patch16_dinov3"'):
        build_on_meta(model)
