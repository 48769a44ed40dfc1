"""transformers' models under ZeRO-3: initial values and features as of a whole model, weights from sharded
folders of transformers."""

from pathlib import Path

import deepspeed
import pytest
import torch
import transformers
from mmcv import Config, ConfigDict

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.distributed.construction import build_for_training
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.weight_loading import load, match_backbone
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
