"""Weight files of every kind: what is read, and what is refused in one sentence."""

import argparse
import json
import os
import time
import zipfile

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import save_file
from timm.models import load_state_dict as timm_state_dict

from internseg_ds.checkpoints.key_matching import match_keys
from internseg_ds.checkpoints.manifest import (
    MANIFEST,
    SaveRecord,
    read_manifest,
    update_metrics,
    verify_manifest,
    write_manifest,
)
from internseg_ds.checkpoints.stored_tensors import LARGEST_PICKLE, ZERO_STAGES, load_stored
from internseg_ds.checkpoints.weights import INDEX, PICKLED_INDEX, open_weights
from internseg_ds.errors import CheckpointError

STATE = {"backbone.a": torch.arange(6.0).view(2, 3), "decode_head.b": torch.ones(4)}


def read(path):
    weights = open_weights(path)
    return {name: weights.read(name) for name in weights.shapes}, weights.meta


def same(found, expected=STATE):
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "meta": {"iter": 3}},
        lambda s: {"module": s},
        lambda s: {"model": s},
        lambda s: {f"module.{name}": value for name, value in s.items()},
    ],
)
def test_a_pth_is_read_bare_and_under_each_wrapper(wrap, tmp_path):
    torch.save(wrap(STATE), tmp_path / "w.pth")
    same(read(tmp_path / "w.pth")[0])


@pytest.mark.parametrize(("average", "other"), [("state_dict_ema", "state_dict"), ("model_ema", "model")])
def test_of_timms_checkpoints_the_averages_are_taken_as_timm_takes_them(average, other, tmp_path, caplog):
    path = tmp_path / "last.pth.tar.pth"
    state = {other: {"module.w": torch.zeros(2)}, average: {"_orig_mod.w": torch.ones(2)}}
    torch.save({**state, "args": argparse.Namespace(model="vit"), "epoch": 3}, path)
    with caplog.at_level("INFO"):
        weights = open_weights(path)
    assert torch.equal(weights.read("w"), torch.ones(2))
    assert torch.equal(weights.read("w"), timm_state_dict(str(path))["w"])
    assert f"taken is {average!r}" in caplog.text and repr(other) in caplog.text
    torch.save({other: state[other], average: None}, path)  # training without an average
    assert torch.equal(open_weights(path).read("w"), torch.zeros(2))


def test_a_pth_of_torch_before_1_6_is_read_and_code_in_it_is_refused(tmp_path):
    torch.save({"state_dict": STATE}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    same(read(tmp_path / "w.pth")[0])
    torch.save({"state_dict": STATE, "x": Attack()}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="run code"):
        read(tmp_path / "w.pth")


def test_one_safetensors_file_and_a_folder_with_an_index_are_read(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors", {"meta": json.dumps({"iter": 5})})
    found, meta = read(tmp_path / "w.safetensors")
    same(found)
    assert meta == {"iter": 5}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for number, (name, value) in enumerate(STATE.items()):
        save_file({name: value}, folder / f"{number}.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(STATE)}})
    )
    same(read(folder)[0])
    (folder / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1\.safetensors is missing"):
        read(folder)
    (folder / INDEX).write_text('{"weight_')
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs pointer"),
        ("w.pth", b"<!DOCTYPE html><html>404</html>", "a web page"),
        ("w.pth", b"PK\x03\x04 not whole", "truncated or no PyTorch file"),
        ("w.pth", b"these are not weights at all", "no PyTorch file"),
        ("w.pth", b"", "truncated or no PyTorch file"),
        ("w.safetensors", b"\x00" * 20, "truncated or no safetensors file"),
        ("w.h5", b"", "unknown ending"),
    ],
)
def test_a_file_that_is_no_weights_is_one_sentence(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.nn.Linear(2, 2), r"holds torch\.nn\.modules\.linear\.Linear beside tensors"),
        ({"a": torch.eye(3).to_sparse()}, "sparse tensors"),
        (
            {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
            "quantized or other special tensors",
        ),
    ],
)
def test_what_is_no_plain_tensor_is_one_sentence(content, words, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=words) as error:
        read(tmp_path / "w.pth")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_numpy_values_in_the_meta_of_mmcvs_files_are_read(tmp_path):
    meta = {
        "PALETTE": np.zeros((2, 3), np.uint8),
        "hook_msgs": {"best_score": np.float64(0.5)},
        "iter": np.int64(3),
    }
    torch.save({"meta": meta, "state_dict": STATE}, tmp_path / "w.pth")
    found, read_meta = read(tmp_path / "w.pth")
    same(found)
    assert (
        read_meta["hook_msgs"] == {"best_score": 0.5}
        and read_meta["iter"] == 3
        and read_meta["PALETTE"] == [[0, 0, 0], [0, 0, 0]]
    )


class Attack:
    def __reduce__(self):
        return os.system, ("touch /tmp/internseg_ds_attacked",)


class OfOldPython:
    """Pickled as members of enums are by Python 3.11.0 to 3.11.3."""

    def __init__(self, owner, name):
        self.named = owner, name

    def __reduce__(self):
        return getattr, self.named


def test_deepspeeds_stage_is_read_whichever_python_wrote_it(tmp_path):
    names = {name: stage.value for name, stage in ZeroStageEnum.__members__.items() if name == stage.name}
    assert names == ZERO_STAGES
    for name in names:
        stages = [getattr(ZeroStageEnum, name), OfOldPython(ZeroStageEnum, name)]
        torch.save({"stages": stages}, tmp_path / "w.pt")
        assert load_stored(tmp_path / "w.pt")["stages"] == [names[name]] * 2
    for owner, name in ((ZeroStageEnum, "mro"), (torch.Size, "numel")):
        torch.save({"stages": OfOldPython(owner, name)}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"holds getattr beside .* run code"):
            load_stored(tmp_path / "w.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": STATE, "x": Attack()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="run code"):
        read(tmp_path / "w.pth")
    assert not os.path.exists("/tmp/internseg_ds_attacked")


def test_a_missing_file_and_a_file_without_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weight file .*nowhere\.pth"):
        read(tmp_path / "nowhere.pth")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no weights, only epoch"):
        read(tmp_path / "w.pth")


def fitted(shapes, path, **settings):
    torch.save(STATE, path / "w.pth")
    return match_keys(
        open_weights(path / "w.pth"), {name: torch.Size(shape) for name, shape in shapes.items()}, **settings
    )


def test_a_prefix_picks_one_part_and_the_rest_is_ignored(tmp_path):
    found = fitted({"a": (2, 3)}, tmp_path, prefix="backbone.")
    assert found.sources == {"a": "backbone.a"} and found.ignored == ["decode_head.b"]


def test_what_may_miss_and_what_may_be_resized_is_reported(tmp_path):
    found = fitted(
        {"backbone.a": (2, 5), "decode_head.b": (4,), "up1.w": (1,)},
        tmp_path,
        resizable={"backbone.a": lambda stored, wanted: stored[0] == wanted[0]},
        may_miss=("up1.",),
    )
    assert found.resized == ["backbone.a"] and found.missing == ["up1.w"]
    assert "1 resized (backbone.a)" in found.summary()


def test_what_cannot_be_resized_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"backbone\.a.*\[2, 3\].*\[3, 5\]"):
        fitted(
            {"backbone.a": (3, 5), "decode_head.b": (4,)},
            tmp_path,
            resizable={"backbone.a": lambda stored, wanted: stored[0] == wanted[0]},
        )


def test_expected_extras_are_known_behind_a_prefix_too(tmp_path):
    found = fitted({}, tmp_path, prefix="backbone.", ignore=("a",))
    assert found.ignored == ["backbone.a", "decode_head.b"]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            {"backbone.a": (2, 4), "decode_head.b": (4,)},
            r"backbone\.a is \[2, 3\] in the file and \[2, 4\] in the model",
        ),
        ({"backbone.a": (2, 3)}, r"unexpected in the file: decode_head\.b"),
        (
            {"backbone.a": (2, 3), "decode_head.b": (4,), "decode_head.c": (1,)},
            r"missing from it: decode_head\.c",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(shapes, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        fitted(shapes, tmp_path)


def test_a_manifest_notices_files_that_changed_or_vanished(tmp_path):
    (tmp_path / "shard.pt").write_bytes(b"12345")
    write_manifest(tmp_path, SaveRecord(step=7, world_size=2, zero_stage=3, meta={"CLASSES": ["sky"]}))
    verify_manifest(tmp_path)
    update_metrics(tmp_path, {"mIoU": 0.5})
    assert read_manifest(tmp_path)["metrics"] == {"mIoU": 0.5} and read_manifest(tmp_path)["step"] == 7
    (tmp_path / "shard.pt").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"shard\.pt has 4 bytes.* 5\b"):
        verify_manifest(tmp_path)
    (tmp_path / "shard.pt").unlink()
    with pytest.raises(CheckpointError, match=r"shard\.pt is missing"):
        verify_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)


def test_position_embeddings_and_patch_kernels_are_resized_as_torch_resizes_pictures():
    from internseg_ds.models.weight_resizing import resize_patch_kernel, resize_position_embedding

    embedding = torch.randn(1, 1 + 16, 5)
    grid = embedding[:, 1:].reshape(1, 4, 4, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (6, 3), mode="bicubic", align_corners=False)
    found = resize_position_embedding(embedding, (6, 3))
    np.testing.assert_allclose(
        found[:, 1:].reshape(1, 6, 3, 5).permute(0, 3, 1, 2).numpy(), expected.numpy(), rtol=1e-6
    )
    assert torch.equal(found[:, 0], embedding[:, 0])
    assert resize_patch_kernel(torch.randn(5, 3, 14, 14), torch.Size((5, 3, 16, 16))).shape == (5, 3, 16, 16)


@pytest.mark.parametrize(("index", "kind"), [(INDEX, "safetensors"), (PICKLED_INDEX, "bin")])
@pytest.mark.parametrize(
    "name", ["../w.{kind}", "{folder}/w.{kind}", "x/../../w.{kind}", "", "a\0b", "x" * 5000]
)
def test_an_index_that_names_files_outside_of_its_folder_is_refused(name, index, kind, tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "w.bin")
    folder = tmp_path / "model"
    (folder / "x").mkdir(parents=True)
    (folder / index).write_text(
        json.dumps({"weight_map": {"backbone.a": name.format(kind=kind, folder=tmp_path)}})
    )
    with pytest.raises(CheckpointError, match=r"index\.json names"):
        read(folder)


def test_shards_that_are_links_are_read(tmp_path):
    """As in the cache of huggingface_hub, whose links lead out of the folder."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_file(STATE, tmp_path / "blob")
    (folder / "model-1.safetensors").symlink_to("../blob")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "model-1.safetensors")}))
    same(read(folder)[0])


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[]",
        "5",
        "{",
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": null}',
    ],
)
def test_a_damaged_index_is_one_sentence(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        read(tmp_path)


@pytest.mark.parametrize("text", [DEEP, "[1]", "5", "{"])
def test_damaged_metadata_and_a_damaged_config_are_one_sentence(text, tmp_path):
    save_file(STATE, tmp_path / "w.safetensors", {"meta": text})
    with pytest.raises(CheckpointError, match=r"'meta'.*w\.safetensors is damaged"):
        read(tmp_path / "w.safetensors")
    save_file(STATE, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        read(tmp_path)


@pytest.mark.parametrize("header", ['{"a":%s}' % DEEP, "null", '{"a":5}'])  # noqa: UP031 - braces
def test_a_damaged_header_is_one_sentence(header, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError, match="truncated"):
        read(tmp_path / "w.safetensors")


def test_millions_of_names_are_refused_before_they_are_read(tmp_path):
    """17 seconds and 2.3 GB, once."""
    header = (
        "{"
        + ",".join(
            f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(400_000)
        )
        + "}"
    )
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    (tmp_path / INDEX).write_text(
        json.dumps(
            {"weight_map": {f"backbone.blocks.{number}.weight": "w.safetensors" for number in range(400_000)}}
        )
    )
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"header of .* 100,000 tensors"):
        read(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json.*16 MiB"):
        read(tmp_path)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pickle_of_millions_of_names_is_refused_before_it_is_read(compression, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w", compression) as archive:
        archive.writestr("w/version", "3\n")
        archive.writestr("w/data.pkl", bytes(LARGEST_PICKLE + 1))
    with pytest.raises(CheckpointError, match=r"w\.pth has 64 MiB"):
        read(tmp_path / "w.pth")


def test_a_pickle_with_a_large_array_is_read(tmp_path):
    """An array of numpy has its values in the pickle."""
    torch.save({"state_dict": STATE, "masks": np.zeros(20 * 2**20, np.uint8)}, tmp_path / "w.pth")
    same(read(tmp_path / "w.pth")[0])


def test_a_pth_of_lists_inside_each_other_is_refused(tmp_path):
    depth = 50_000
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
        archive.writestr("w/version", "3\n")
        archive.writestr("w/byteorder", "little")
    with pytest.raises(CheckpointError, match="deeper than any checkpoint's"):
        read(tmp_path / "w.pth")


def test_pytorch_model_bin_of_transformers_is_read_in_one_piece_and_in_shards(tmp_path):
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    whole.mkdir(), sharded.mkdir()
    torch.save(STATE, whole / "pytorch_model.bin")
    torch.save({"optimizer": torch.ones(3)}, whole / "training_args.bin")  # lies beside it, and is no weights
    (whole / "config.json").write_text('{"hidden_size": 3}')
    same(read(whole)[0])
    assert open_weights(whole).config == {"hidden_size": 3}
    for number, (name, value) in enumerate(STATE.items()):
        torch.save({name: value}, sharded / f"pytorch_model-{number}.bin")
    (sharded / PICKLED_INDEX).write_text(
        json.dumps({"weight_map": {name: f"pytorch_model-{number}.bin" for number, name in enumerate(STATE)}})
    )
    same(read(sharded)[0])
    assert open_weights(sharded).read_slice("backbone.a", 2, 5).tolist() == [2.0, 3.0, 4.0]
    (sharded / "pytorch_model-1.bin").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"pytorch_model-1\.bin is missing.*pytorch_model\.bin\.index\.json",
    ):
        read(sharded)
