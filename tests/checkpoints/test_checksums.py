"""What is not what was written is refused, wherever it lies: bits of every file of a save, swapped files,
weights with their sum file."""

import random
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
import xxhash

from internseg_ds.checkpoints import checksums
from internseg_ds.checkpoints.checksum_files import sum_file, verify
from internseg_ds.checkpoints.checksums import BlockSums, SummedFile, of_digests, of_zip
from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.checkpoints.manifest import MANIFEST, read_manifest, update_metrics
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.distributed.zero_internals import fp32_partitions
from internseg_ds.errors import CheckpointError, DamagedError
from internseg_ds.optimization.ema import ShardedEma
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.train_state import TrainState
from tests.checkpoints.write_toy_checkpoints import SETTINGS, build
from tests.distributed.ranks import spawn

EVERYTHING = ("fp32", "exp_avg", "exp_avg_sq", "ema")


def save_toys(folder: Path) -> None:
    """Two saves of each of these, with moments and an average, ZeRO-1 in the background; NAME_again is as of
    another run, at the same step."""
    deepspeed.init_distributed(verbose=False)
    for name, setting, background in (("zero3", "zero3_bf16", False), ("zero1", "zero1_bf16", True)):
        engine = build(*SETTINGS[setting])
        engine.checkpoint_engine = NotingCheckpointEngine(engine._config, background=background)
        ema = ShardedEma(engine, 0.9)
        torch.manual_seed(dist.get_rank())
        engine.backward(engine(torch.randn(4, 7).to(engine.device, torch.bfloat16)))
        engine.step()
        ema.update()
        for run in (name, f"{name}_again"):
            checkpoints = Checkpointer(folder / run / "checkpoints", keep=-1)
            assert checkpoints.save(engine, TrainState(step=1, run=run), {"CLASSES": ["sky"]}, ema=ema)
            checkpoints.finish()
            for values in (*(master.data for master in fp32_partitions(engine)), *ema.shards):
                values.mul_(1.5)
        engine.destroy()


@pytest.fixture(scope="module")
def saves(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saves")
    spawn(save_toys, 2, folder)
    return folder


def copied(saves: Path, name: str, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "iter_1", ignore_errors=True)
    return Path(shutil.copytree(saves / name / "checkpoints" / "iter_1", tmp_path / "iter_1"))


def values_of(path: Path, *, check: bool = True) -> dict:
    """All that a run or an evaluation takes from a save."""
    checkpoint = ZeroCheckpoint(path, check=check)
    found = {
        (what, name): checkpoint.read_slice(name, 0, shape.numel(), what)
        for name, shape in checkpoint.shapes.items()
        for what in EVERYTHING
        if name in checkpoint.trained or what in ("fp32", "ema")
    }
    return (
        found
        | {("buffer", name): value for name, value in checkpoint.buffers.items()}
        | {
            "state": (
                checkpoint.steps,
                checkpoint.samples,
                checkpoint.scheduled,
                checkpoint.updates,
                checkpoint.client_state,
            ),
            "note": {
                key: value
                for key, value in checkpoint.manifest.items()
                if key in ("step", "run", "number", "world_size", "meta", "metrics", "groups")
            },
        }
    )


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def refused_or_harmless(file: Path, bits: int, read, chance: random.Random) -> tuple[int, int]:
    """Flips that many bits of a file, one at a time; how many were refused, and how many harmless. Anything
    else fails."""
    before, refused, harmless = read(), 0, 0
    for _ in range(bits):
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        try:
            found = read()
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert same(before, found), f"bit {bit} of {file.name} changed what is read, and nobody noticed"
            harmless += 1
        flip(file, bit)
    return refused, harmless


@pytest.mark.parametrize(
    ("name", "tries"), [("zero3", 200), ("zero1", 100), pytest.param("zero3", 4000, marks=pytest.mark.slow)]
)
def test_every_bit_of_every_file_of_a_save_is_refused_or_harmless(name, tries, saves, tmp_path):
    path, chance, refused = copied(saves, name, tmp_path), random.Random(1), {}
    files = sorted(path.iterdir())
    assert {file.name for file in files} == read_manifest(path)["files"].keys() | {MANIFEST} and len(
        files
    ) > 5
    for file in files:
        refused[file.name] = refused_or_harmless(
            file, tries // len(files) + 1, lambda: values_of(path), chance
        )
    for file, (found, harmless) in refused.items():
        assert found > harmless or not file.endswith((".pt", ".json")), file


@pytest.mark.parametrize("name", ["zero3_bf16", "zero2_fp32"])
def test_a_checkpoint_of_plain_deepspeed_is_held_against_the_checksums_of_its_archives(
    name, toy_checkpoints, tmp_path
):
    path, chance = (
        Path(shutil.copytree(toy_checkpoints / name / "global_step2", tmp_path / "step")),
        random.Random(2),
    )

    def read():
        checkpoint = ZeroCheckpoint(path)
        return {
            (what, each): checkpoint.read_slice(each, 0, shape.numel(), what)
            for each, shape in checkpoint.shapes.items()
            for what in ("fp32", "exp_avg")
            if what == "fp32" or each in checkpoint.trained
        }

    for file in path.glob("*.pt"):
        refused, _ = refused_or_harmless(file, 15, read, chance)
        assert refused
    shard = next(path.glob("*rank_1*optim*"))
    values = torch.load(shard, weights_only=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(values, shard)
    finally:
        torch.serialization.set_crc32_options(True)
    read()  # an archive without any is no error


def test_a_swapped_file_and_one_of_another_run_are_refused(saves, tmp_path):
    path = copied(saves, "zero3", tmp_path)
    for kind in ("optim_states", "model_states", "ema_states"):
        first, second = sorted(path.glob(f"*_{kind}.pt"))
        kept = first.read_bytes(), second.read_bytes()
        first.write_bytes(kept[1]), second.write_bytes(kept[0])
        with pytest.raises(CheckpointError, match=rf"{kind}\.pt (is not|has)"):
            values_of(path)
        first.write_bytes(kept[0]), second.write_bytes(kept[1])
    values_of(path)
    for file in path.glob("*.pt"):
        kept = file.read_bytes()
        shutil.copy(saves / "zero3_again" / "checkpoints" / "iter_1" / file.name, file)
        with pytest.raises(CheckpointError, match=r"not what was written|its save wrote"):
            values_of(path)
        file.write_bytes(kept)


def test_what_is_skipped_is_read_as_it_is(saves, tmp_path):
    path = copied(saves, "zero3", tmp_path)
    before, shard = values_of(path), next(path.glob("*rank_1*optim*"))
    stored = ZeroCheckpoint(path)._flat["fp32"][1][0]
    flip(shard, 8 * stored.place + 3)
    with pytest.raises(
        CheckpointError,
        match=r"bytes 0 to.*\b\w{32}, internseg_ds\.json.*\b\w{32}\b",
    ):
        values_of(path)
    assert not same(values_of(path, check=False), before)
    for read in (
        lambda check: consolidate(path, tmp_path / "w.pth", check=check),
        lambda check: open_weights(path, check=check),
    ):
        with pytest.raises(CheckpointError, match="not what was written"):
            read(True)
        read(False)


def test_scores_added_later_leave_the_note_whole(saves, tmp_path):
    path = copied(saves, "zero3", tmp_path)
    update_metrics(path, {"mIoU": 0.5, "never": float("nan")})
    assert read_manifest(path)["metrics"]["mIoU"] == 0.5
    text = (path / MANIFEST).read_text()
    assert read_manifest(path)["run"] == "zero3" and read_manifest(path)["world_size"] == 2
    assert {
        entry["rank"] for name, entry in read_manifest(path)["files"].items() if name.endswith(".pt")
    } == {0, 1}
    (path / MANIFEST).write_text(text.replace('"mIoU": 0.5', '"mIoU": 0.7'))
    with pytest.raises(CheckpointError, match="its checksum says"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "folder"])
def test_every_bit_of_weights_with_a_sum_file_is_refused_or_harmless(name, saves, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK", 256)
    monkeypatch.setattr("internseg_ds.checkpoints.checksum_files.BLOCK", 256)
    monkeypatch.setattr("internseg_ds.checkpoints.consolidate.SHARD_BYTES", 100)
    out, chance = consolidate(saves / "zero3", tmp_path / name), random.Random(3)

    def read():
        weights = open_weights(out)
        return {each: weights.read(each) for each in weights.shapes} | {"meta": weights.meta}

    for file in [*(out.iterdir() if out.is_dir() else [out]), sum_file(out)]:
        refused, harmless = refused_or_harmless(file, 20, read, chance)
        assert refused > harmless
    verify(out)


def test_weights_may_be_renamed_with_their_sums_and_have_none(saves, tmp_path):
    out = consolidate(saves / "zero3", tmp_path / "w.pth")
    other = out.rename(tmp_path / "other.pth")
    open_weights(other).read("gain")
    sum_file(out).rename(sum_file(other))
    open_weights(other).read("gain")
    digest = xxhash.xxh3_128_hexdigest(other.read_bytes())
    sum_file(other).write_text(f"{digest}  other.pth\n")  # as xxh128sum writes it, and we did
    open_weights(other).read("gain")
    sum_file(other).write_text(f"{digest[::-1]}  other.pth\n")
    with pytest.raises(CheckpointError, match=r"other\.pth.*other\.pth\.xxh128"):
        open_weights(other)
    open_weights(other, check=False).read("gain")
    sum_file(other).write_text("what is this")
    with pytest.raises(CheckpointError, match="damaged or empty"):
        open_weights(other)


def test_a_read_of_any_length_checks_the_blocks_that_it_lies_in_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK", 64)
    data, chance = random.Random(0).randbytes(1000), random.Random(4)
    file = SummedFile(tmp_path / "f")
    for start in range(0, 1000, 130):
        file.write(data[start : start + 130])
    written = file.close()
    assert (tmp_path / "f").read_bytes() == data and written.size == 1000
    assert written.digests == "".join(
        xxhash.xxh3_128_hexdigest(data[at : at + 64]) for at in range(0, 1000, 64)
    )
    for _ in range(300):
        checked = of_digests(tmp_path / "f", 1000, written.digests, "the test", 64)
        with checked.opened() as opened:
            for _ in range(3):
                start, length = chance.randrange(1000), chance.randrange(1, 400)
                opened.seek(start)
                assert opened.read(length) == data[start : start + length]
        bit = chance.randrange(8000)
        flip(tmp_path / "f", bit)
        if not checked._seen[bit // 512]:  # what was not read before
            with pytest.raises(DamagedError, match="not what was written"), checked.opened() as opened:
                opened.read(1000)
            with pytest.raises(DamagedError, match="not what was written"):
                checked.check()
        flip(tmp_path / "f", bit)


def test_bytes_that_come_by_in_any_pieces_have_the_same_sums(monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK", 64)
    data, chance, whole = memoryview(random.Random(0).randbytes(640)), random.Random(1), BlockSums()
    whole.update(data)
    for _ in range(20):
        pieces, at = BlockSums(), 0
        while at < 640:
            step = chance.randrange(0, 200)
            pieces.update(data[at : at + step])
            at += step
        assert (pieces.size, pieces.hexdigests()) == (whole.size, whole.hexdigests()) and len(
            whole.hexdigests()
        ) == 320


def test_a_file_of_torch_before_1_6_has_no_archive_to_be_held_against(tmp_path):
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert of_zip(tmp_path / "old.pt") is None
