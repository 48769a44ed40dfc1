"""timm's models under ZeRO-3: initial values and tables as in a whole model, weights from timm's files."""

from pathlib import Path

import deepspeed
import pytest
import timm
import torch
from mmcv import Config

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.distributed.construction import build_for_training, build_on_meta
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.weight_loading import load, match_backbone
from internseg_ds.errors import CheckpointError
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import ds_config

FAMILIES = {
    "dinov3": dict(model_name="vit_small_patch16_dinov3"),
    "siglip": dict(
        model_name="vit_base_patch16_siglip_224",
        img_size=64,
        model_args=dict(embed_dim=64, depth=5, num_heads=4),
    ),
    "convnext": dict(model_name="convnext_atto", model_args=dict(dims=(8, 16, 24, 64), depths=(1, 1, 2, 1))),
}


def segmentor(family: str) -> Config:
    model = Config.fromfile(ROOT / "configs/timm_tiny/upernet_dinov3_tiny_112_ade20k.py").model
    for key, value in FAMILIES[family].items():
        model.backbone[key] = value
    if family == "convnext":
        model.decode_head.in_channels, model.auxiliary_head.in_channels = [8, 16, 24, 64], 24
    return model


def values_are_those_of_a_whole_model(family: str, bf16: bool) -> None:
    deepspeed.init_distributed(verbose=False)
    cpu = torch.device("cpu")
    expected = build_for_training(segmentor(family), ds_config(1, bf16=bf16), cpu, 0).state_dict()
    model = build_for_training(segmentor(family), ds_config(3, world_size=2, bf16=bf16), cpu, 0)
    largest = max(model.backbone.parameters(), key=lambda param: param.ds_numel)
    assert largest.numel() == 0  # really partitioned
    for name, param in model.named_parameters():
        with gathered([param]):
            assert torch.equal(param.data, expected[name]), name
    if family == "dinov3":
        table = timm.create_model("vit_small_patch16_dinov3", embed_dim=64, num_heads=4).rope.get_embed(
            (5, 7)
        )
        found = model.backbone.model.rope.get_embed((5, 7))
        assert found.dtype == torch.float32 and torch.equal(found, table)
        assert not torch.equal(table, table.bfloat16().float())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bf16", [True, False])
def test_zero3_starts_from_the_values_of_a_whole_model(family, bf16):
    spawn(values_are_those_of_a_whole_model, 2, family, bf16)


def published(folder: Path) -> Path:
    """A file of timm's for images of 96 pixels, with a classifier."""
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_base_patch16_siglip_224", embed_dim=64, depth=5, num_heads=4, img_size=96, num_classes=10
    )
    torch.save(model.state_dict(), folder / "timm.pth")
    return folder / "timm.pth"


def reads_its_shards(path: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    model = build_for_training(segmentor("siglip"), ds_config(3, world_size=2), torch.device("cpu"), 0)
    load(model, match_backbone(model, open_weights(path)))
    theirs = timm.create_model(
        "vit_base_patch16_siglip_224", embed_dim=64, depth=5, num_heads=4, img_size=96, num_classes=10
    )
    theirs.load_state_dict(torch.load(path, weights_only=True))
    theirs.set_input_size(img_size=64)  # timm's own way to another size
    expected = theirs.state_dict()
    for name, param in model.backbone.named_parameters():
        with gathered([param]):
            assert torch.equal(param.data, expected[name.removeprefix("model.")].bfloat16()), name


def test_each_rank_reads_its_shard_of_timms_files_resized_as_timm_does(tmp_path):
    path = published(tmp_path)
    found = match_backbone(build_on_meta(segmentor("siglip")), open_weights(path))
    assert found.resized == ["model.pos_embed"] and not found.missing
    assert {name.split(".")[0] for name in found.ignored} == {"head", "norm", "attn_pool", "blocks"}
    spawn(reads_its_shards, 2, path)


def test_a_file_of_another_model_is_refused(tmp_path):
    path = published(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.cls_token"):
        match_backbone(build_on_meta(segmentor("dinov3")), open_weights(path))
