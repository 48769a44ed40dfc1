"""One ordinary checkpoint out of ZeRO shards: the values, the dtypes, and what is never overwritten. (Layouts
by size: tests/end_to_end.)"""

import shutil
from types import SimpleNamespace

import pytest
import torch

from internseg_ds.checkpoints import consolidate as module
from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.checkpoints.manifest import SaveRecord, write_manifest
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.errors import CheckpointError


@pytest.mark.parametrize("setting", ["zero1_bf16", "zero1_bf16_fp32_gradients", "zero2_bf16", "zero3_bf16"])
@pytest.mark.parametrize("out", ["w.pth", "w.safetensors", "folder"])
def test_no_weight_is_lost_and_each_is_exact(setting, out, toy_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    expected = torch.load(toy_checkpoints / setting / "truth.pt")["global_step2"]
    weights = open_weights(consolidate(toy_checkpoints / setting, tmp_path / out))
    assert set(weights.shapes) == set(expected["fp32"]) | set(expected["buffers"])
    for name, value in (expected["fp32"] | expected["buffers"]).items():
        assert torch.equal(weights.read(name), value.float() if value.is_floating_point() else value), name


def test_bf16_is_for_the_backbone_alone_and_statistics_stay_fp32(toy_checkpoints, tmp_path):
    file = consolidate(toy_checkpoints / "zero3_bf16", tmp_path / "w.pth", dtype="bfloat16")
    found = {
        name: value.dtype
        for name, value in torch.load(file, weights_only=True)["state_dict"].items()
        if value.is_floating_point()
    }
    assert {dtype for name, dtype in found.items() if name.startswith("backbone.")} == {torch.bfloat16}
    assert {dtype for name, dtype in found.items() if not name.startswith("backbone.")} == {torch.float32}
    assert "norm.running_mean" in found


def test_a_pth_carries_mmsegs_meta(toy_checkpoints, tmp_path):
    save = tmp_path / "iter_2"
    shutil.copytree(toy_checkpoints / "zero3_bf16/global_step2", save)
    write_manifest(
        save,
        SaveRecord(
            step=2,
            world_size=2,
            zero_stage=3,
            meta={"CLASSES": ["sky"], "PALETTE": [[1, 2, 3]], "config": "a = 1"},
            metrics={"mIoU": 0.5},
        ),
    )
    meta = torch.load(consolidate(save, tmp_path / "w.pth"), weights_only=True)["meta"]
    assert meta == {
        "CLASSES": ["sky"],
        "PALETTE": [[1, 2, 3]],
        "config": "a = 1",
        "iter": 2,
        "metrics": {"mIoU": 0.5},
        "mIoU": 0.5,
    }


def test_an_existing_file_or_folder_of_weights_is_replaced_only_when_told(toy_checkpoints, tmp_path):
    for name in ("w.pth", "folder"):
        out = consolidate(toy_checkpoints / "zero2_bf16", tmp_path / name)
        with pytest.raises(CheckpointError, match="exists already"):
            consolidate(toy_checkpoints / "zero3_bf16", out)
        consolidate(toy_checkpoints / "zero3_bf16", out, overwrite=True)


def test_a_work_directory_is_never_overwritten(toy_checkpoints, tmp_path):
    shutil.copytree(toy_checkpoints / "zero3_bf16", tmp_path / "work" / "checkpoints")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "work", tmp_path / "work" / "checkpoints"):
        with pytest.raises(CheckpointError, match="holds more than consolidated weights"):
            consolidate(tmp_path / "work", out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_strangers_in_the_way_are_left_alone(toy_checkpoints, tmp_path):
    (tmp_path / "latest").write_text("iter_3")
    with pytest.raises(CheckpointError, match="none of ours"):
        consolidate(toy_checkpoints / "zero3_bf16", tmp_path / "latest", overwrite=True)
    (tmp_path / "keep.partial").mkdir()
    (tmp_path / "keep.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="in the way"):
        consolidate(toy_checkpoints / "zero3_bf16", tmp_path / "keep")
    assert (tmp_path / "latest").read_text() == "iter_3" and (
        tmp_path / "keep.partial" / "thesis.txt"
    ).read_text() == "precious"


def test_a_full_disk_and_an_unknown_ending_are_noticed_before_the_first_byte(
    toy_checkpoints, tmp_path, monkeypatch
):
    with pytest.raises(CheckpointError, match="unknown ending"):
        consolidate(toy_checkpoints / "zero3_bf16", tmp_path / "w.h5")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="GiB are free"):
        consolidate(toy_checkpoints / "zero3_bf16", tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())
