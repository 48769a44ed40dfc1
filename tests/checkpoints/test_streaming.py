"""Files written piece by piece: the libraries read them, memory stays small, and a changed byte is
noticed."""

import os
import sys

import pytest
import torch
import xxhash
from safetensors.torch import load_file

import internseg_ds.checkpoints.streaming as streaming
from benchmarks.consolidate import measure, write_checkpoint
from internseg_ds.checkpoints.checksum_files import verify
from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.checkpoints.stored_tensors import HeldTensor, load_stored
from internseg_ds.checkpoints.streaming import Entry, write_pth, write_safetensors
from internseg_ds.errors import CheckpointError
from tests.conftest import ROOT

VALUES = {
    "a": torch.randn(7, 5),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "half": torch.randn(3, 3).bfloat16(),
    "long": torch.randn(1000),
}


def entries():
    return {
        name: Entry(value.shape, value.dtype, HeldTensor(value).read_slice) for name, value in VALUES.items()
    }


def test_both_forms_are_read_by_their_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 64)
    written = []
    sums = {
        "w.pth": write_pth(tmp_path / "w.pth", entries(), {"iter": 3}, written.append),
        "w.safetensors": write_safetensors(
            tmp_path / "w.safetensors", entries(), {"format": "pt"}, written.append
        ),
    }
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert content["meta"] == {"iter": 3}
    for found in (
        content["state_dict"],
        torch.load(tmp_path / "w.pth", weights_only=True, mmap=True)["state_dict"],
        load_file(tmp_path / "w.safetensors"),
    ):
        assert set(found) == set(VALUES) and all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype
            for name, value in VALUES.items()
        )
    assert sum(written) == 2 * sum(value.nbytes for value in VALUES.values())
    for name, digest in sums.items():
        assert xxhash.xxh3_128_hexdigest((tmp_path / name).read_bytes()) == digest.whole


def test_slices_of_a_file_are_those_of_the_tensor(tmp_path):
    grid = torch.arange(24.0).view(4, 6)
    torch.save({"whole": grid, "part": grid[1:3], "turned": grid.T, "column": grid[:, 2]}, tmp_path / "w.pth")
    found = load_stored(tmp_path / "w.pth")
    for name, value in {"whole": grid, "part": grid[1:3], "turned": grid.T, "column": grid[:, 2]}.items():
        assert torch.equal(found[name].read(), value)
        assert torch.equal(found[name].read_slice(1, 4), value.flatten()[1:4])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A ZeRO-3 checkpoint of 0.9 GiB of weights and 1.8 GiB of moments, saved by 3 processes; its largest
    tensor has 156 MiB."""
    folder = tmp_path_factory.mktemp("big") / "checkpoints"
    write_checkpoint(folder, 0.9, 3)
    return folder


@pytest.fixture(scope="module")
def floor() -> int:
    """Bytes that a process has at its most which only imports torch."""
    return measure([sys.executable, "-c", "import torch"])[1]


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", pytest.param("folder", marks=pytest.mark.slow)])
def test_memory_depends_neither_on_the_model_nor_on_its_largest_tensor(name, big, floor, tmp_path):
    _, peak = measure(
        [
            sys.executable,
            str(ROOT / "launch/consolidate.py"),
            str(big),
            str(tmp_path / name),
            "--dtype",
            "bfloat16",
        ]
    )
    assert peak - floor < 300 * 2**20  # of which the libraries take most


def test_a_changed_byte_and_a_missing_file_are_noticed(toy_checkpoints, tmp_path):
    for name in ("w.pth", "folder"):
        out = consolidate(toy_checkpoints / "zero3_bf16", tmp_path / name)
        verify(out)
        file = out if out.is_file() else next(out.glob("*.safetensors"))
        with file.open("r+b") as opened:
            opened.seek(-3, os.SEEK_END)
            opened.write(b"x")
        with pytest.raises(CheckpointError, match=f"{file.name} is not"):
            verify(out)
        file.unlink()
        with pytest.raises(CheckpointError, match="missing"):
            verify(out)
    for text in (None, "", "garbage"):
        if text is not None:
            (tmp_path / "other.pth.xxh128").write_text(text)
        with pytest.raises(CheckpointError, match="nothing says what"):
            verify(tmp_path / "other.pth")
