"""Our reader of ZeRO checkpoints against DeepSpeed's own, on checkpoints of real runs, and what consolidation
makes of them."""

import shutil

import pytest
import torch
import xxhash
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

import internseg_ds.checkpoints.consolidate as consolidation
from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.errors import CheckpointError
from tests.end_to_end.conftest import STEPS


@pytest.fixture(scope="module")
def saved(long_run, trained):
    """Checkpoint folders by ds_config."""
    folders = {
        name: long_run(name).work_dir / "checkpoints"
        for name in ("zero1_bf16", "zero2_bf16", "zero3_autocast")
    }
    return {"zero3_bf16": trained.work_dir / "checkpoints"} | folders


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_autocast"])
def test_every_master_weight_is_what_deepspeeds_own_reader_finds(name, saved):
    expected = get_fp32_state_dict_from_zero_checkpoint(
        str(saved[name]), tag=(saved[name] / "latest").read_text()
    )
    checkpoint = ZeroCheckpoint.open(saved[name])
    assert set(checkpoint.shapes) | set(checkpoint.buffers) == set(expected)
    for parameter in checkpoint.shapes:
        assert torch.equal(checkpoint.read(parameter), expected[parameter]), parameter
    assert (checkpoint.stage, checkpoint.world_size) == (int(name[4]), 2)


def test_the_three_forms_of_one_file_hold_the_same_values(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(consolidation, "SHARD_BYTES", 30_000)
    outs = [
        consolidate(saved["zero3_bf16"], tmp_path / name) for name in ("one.pth", "one.safetensors", "folder")
    ]
    assert len(list(outs[2].glob("*.safetensors"))) > 1
    values = []
    for out in outs:
        weights = open_weights(out)
        values.append({name: weights.read(name) for name in weights.shapes})
        assert weights.meta["iter"] == 12 and len(weights.meta["CLASSES"]) == 150
    for other in values[1:]:
        assert set(other) == set(values[0]) and all(
            torch.equal(other[name], values[0][name]) for name in other
        )
    digest, name = (tmp_path / "one.pth.xxh128").read_text().splitlines()[0].split()
    assert digest == xxhash.xxh3_128_hexdigest((tmp_path / name).read_bytes())


def test_bf16_is_for_the_backbone_alone(saved, tmp_path):
    values = load_file(consolidate(saved["zero3_bf16"], tmp_path / "half.safetensors", dtype="bfloat16"))
    dtypes = {
        (name.startswith("backbone."), value.dtype)
        for name, value in values.items()
        if value.is_floating_point()
    }
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}


def test_an_existing_file_is_not_replaced_unasked(saved, tmp_path):
    out = tmp_path / "one.pth"
    out.write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        consolidate(saved["zero3_bf16"], out)
    assert out.read_text() == "precious"


def test_the_best_checkpoint_can_be_asked_for(saved):
    best = (saved["zero3_bf16"] / "best").read_text()
    assert ZeroCheckpoint.open(saved["zero3_bf16"], "best").path.name == best
    with pytest.raises(CheckpointError, match="there are: iter_12, iter_6"):
        ZeroCheckpoint.open(saved["zero3_bf16"], "iter_99")


def damaged(source, target, damage):
    shutil.copytree(source / (source / "latest").read_text(), target)
    (target / "internseg_ds.json").unlink()  # as a checkpoint of plain DeepSpeed
    damage(target)
    return target


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: next(path.glob("*zero_pp_rank_0_*optim*")).unlink(), "rank 0 is missing"),
        (lambda path: next(path.glob("*zero_pp_rank_1_*optim*")).unlink(), "mixes runs|model_states"),
        (
            lambda path: next(path.glob("*zero_pp_rank_1_*model*")).unlink(),
            "1 model_states file for 2 processes",
        ),
        (lambda path: [file.unlink() for file in path.glob("*.pt")], "no ZeRO checkpoint"),
        (
            lambda path: next(path.glob("*zero_pp_rank_1_*optim*")).write_bytes(b"short"),
            "truncated or no PyTorch file",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_one_sentence(damage, words, saved, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        ZeroCheckpoint(damaged(saved["zero3_bf16"], tmp_path / "iter_12", damage))


def test_shards_of_two_runs_are_not_mixed(saved, tmp_path):
    def mix(path):
        stranger = next((saved["zero2_bf16"] / f"iter_{STEPS}").glob("*zero_pp_rank_1_*optim*"))
        shutil.copy(stranger, next(path.glob("*zero_pp_rank_1_*optim*")))

    with pytest.raises(CheckpointError, match="mixes runs"):
        ZeroCheckpoint(damaged(saved["zero3_bf16"], tmp_path / "iter_12", mix))


def test_a_run_starts_from_the_weights_of_a_checkpoint(train, saved):
    run = train(
        "--load-from",
        saved["zero3_bf16"],
        "--no-validate",
        "--deepspeed_config",
        "ds_configs/zero2_bf16.json",
        options=["runner.max_iters=1", "checkpoint_config.interval=1", "lr_config.warmup_ratio=1e-9"],
    )
    before, after = ZeroCheckpoint.open(saved["zero3_bf16"]), ZeroCheckpoint.open(run.work_dir)
    for name in before.shapes:  # one step at a rate of nearly zero: what was loaded, rounded to bf16
        torch.testing.assert_close(
            after.read(name), before.read(name).bfloat16().float(), rtol=1e-4, atol=1e-6
        )
