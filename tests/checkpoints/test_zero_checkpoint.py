"""The reader of ZeRO checkpoints, against what the run that wrote them held: every stage, precision and
layout that DeepSpeed has a file format for."""

import shutil

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from internseg_ds.checkpoints.manifest import SaveRecord, write_manifest
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.checkpoints.zero_files import is_zero_checkpoint
from internseg_ds.errors import CheckpointError
from tests.checkpoints.write_toy_checkpoints import SETTINGS

FROZEN = {"backbone.0.weight", "backbone.2.weight"}
EVERY = pytest.mark.parametrize("name", SETTINGS)


def truth(folder, tag):
    return torch.load(folder / "truth.pt")[tag]


@EVERY
def test_every_weight_and_buffer_is_what_the_run_held(name, toy_checkpoints):
    for tag in ("global_step1", "global_step2"):
        expected = truth(toy_checkpoints / name, tag)
        checkpoint = ZeroCheckpoint.open(toy_checkpoints / name, tag)
        assert (checkpoint.stage, checkpoint.world_size) == (int(name[4]), 2)
        assert set(checkpoint.shapes) == set(expected["fp32"]) and set(checkpoint.shapes) >= FROZEN
        for parameter, value in expected["fp32"].items():
            found = checkpoint.read(parameter)
            assert found.dtype == torch.float32 and torch.equal(found, value.float()), parameter
        assert set(checkpoint.buffers) == set(expected["buffers"])
        for buffer, value in expected["buffers"].items():
            assert torch.equal(
                checkpoint.buffers[buffer], value.float() if value.is_floating_point() else value
            ), buffer
            assert checkpoint.buffers[buffer].dtype in (torch.float32, torch.int64)


@EVERY
def test_any_slice_of_a_weight_and_of_its_moments_is_read(name, toy_checkpoints):
    expected = truth(toy_checkpoints / name, "global_step2")
    checkpoint = ZeroCheckpoint.open(toy_checkpoints / name)
    for what in ("fp32", "exp_avg", "exp_avg_sq"):
        assert what == "fp32" or set(expected[what]) == set(checkpoint.shapes) - FROZEN
        for parameter, value in expected[what].items():
            flat = value.float().flatten()
            numel = flat.numel()
            # across and within the shares of two ranks
            for start, stop in ((0, numel), (numel // 3, numel - numel // 4), (numel - 1, numel), (0, 0)):
                assert torch.equal(checkpoint.read_slice(parameter, start, stop, what), flat[start:stop]), (
                    what,
                    parameter,
                    start,
                    stop,
                )


@EVERY
def test_deepspeeds_own_reader_agrees_where_it_can_read(name, toy_checkpoints):
    if name == "zero1_bf16_fp32_gradients":
        pytest.skip("zero_to_fp32 refuses it: its files name no stage")
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(toy_checkpoints / name))
    ours = ZeroCheckpoint.open(toy_checkpoints / name)
    lost = FROZEN if name.startswith("zero1") else set()  # deepspeed 0.19.8 leaves frozen weights out
    assert set(theirs) == (set(ours.shapes) | set(ours.buffers)) - lost
    for parameter in set(ours.shapes) - lost:
        assert torch.equal(ours.read(parameter), theirs[parameter].float()), parameter


def test_a_frozen_weight_has_no_moments(toy_checkpoints):
    with pytest.raises(CheckpointError, match=r"backbone\.0\.weight is frozen.* exp_avg"):
        ZeroCheckpoint.open(toy_checkpoints / "zero3_bf16").read_slice("backbone.0.weight", 0, 1, "exp_avg")


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/global_step2", "checkpoints/latest"])
def test_a_work_directory_its_checkpoints_its_pointer_and_one_save_name_the_same(
    where, toy_checkpoints, tmp_path
):
    (tmp_path / "checkpoints").symlink_to(toy_checkpoints / "zero3_bf16")
    assert ZeroCheckpoint.open(tmp_path / where).path.name == "global_step2"
    assert is_zero_checkpoint(tmp_path / where)


def test_a_missing_directory_pointer_or_tag_is_one_sentence(toy_checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint directory .*nowhere"):
        ZeroCheckpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no .*latest"):
        ZeroCheckpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="there are: global_step1, global_step2"):
        ZeroCheckpoint.open(toy_checkpoints / "zero3_bf16", "global_step3")


def only(path, pattern):
    (file,) = path.glob(pattern)
    return file


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def from_other_save(path, pattern, source):
    shutil.copy(only(source, pattern), path)


@pytest.mark.parametrize(
    ("setting", "damage", "words"),
    [
        (
            "zero3_bf16",
            lambda path, _: only(path, "*zero_pp_rank_0*optim*").unlink(),
            "optim_states file of rank 0 is missing",
        ),
        (
            "zero3_bf16",
            lambda path, _: only(path, "*rank_1*optim*").unlink(),
            "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt is missing",
        ),
        (
            "zero2_fp32",
            lambda path, _: only(path, "*rank_1*optim*").unlink(),
            "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing",
        ),
        (
            "zero3_bf16",
            lambda path, _: only(path, "*rank_1*model*").unlink(),
            "zero_pp_rank_1_mp_rank_00_model_states.pt is missing",
        ),
        ("zero2_bf16", lambda path, _: only(path, "*model*").unlink(), r"holds no \*_model_states.pt"),
        (
            "zero3_bf16",
            lambda path, _: cut(only(path, "*rank_1*optim*")),
            "rank_1_mp_rank_00_optim_states.pt is truncated",
        ),
        ("zero2_bf16", lambda path, _: cut(only(path, "*model*")), "mp_rank_00_model_states.pt is truncated"),
        (
            "zero3_bf16",
            lambda path, toy: from_other_save(path, "*rank_1*optim*", toy / "zero3_bf16/global_step1"),
            "rank_1_mp_rank_00_optim_states.pt is of optimizer step 1",
        ),
        (
            "zero2_bf16",
            lambda path, toy: from_other_save(path, "*rank_1*optim*", toy / "zero2_bf16/global_step1"),
            "rank_1_mp_rank_00_optim_states.pt is of optimizer step 1",
        ),
        (
            "zero3_bf16",
            lambda path, toy: from_other_save(path, "*rank_1*model*", toy / "zero3_bf16/global_step1"),
            "rank_1_mp_rank_00_model_states.pt is of step 1",
        ),
        (
            "zero3_bf16",
            lambda path, toy: from_other_save(path, "*rank_1*optim*", toy / "zero2_bf16/global_step2"),
            "mixes runs: .*rank_1.* saved by 2 processes under ZeRO-2",
        ),
        (
            "zero3_bf16",
            lambda path, toy: from_other_save(path, "*rank_1*optim*", toy / "zero3_fp32/global_step2"),
            "are both of rank 1",
        ),
        (
            "zero3_bf16",
            lambda path, _: shutil.copy(
                only(path, "*rank_1*optim*"), path / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
            ),
            "there are 3 such files",
        ),
        (
            "zero3_bf16",
            lambda path, _: torch.save({"module": {}}, only(path, "*zero_pp_rank_0*optim*")),
            "rank_0_mp_rank_00_optim_states.pt holds no optimizer state",
        ),
        (
            "zero3_bf16",
            lambda path, _: torch.save({"module": {}}, only(path, "*rank_1*model*")),
            "rank_1_mp_rank_00_model_states.pt holds no model state",
        ),
    ],
)
def test_a_damaged_or_mixed_checkpoint_is_refused_by_file(setting, damage, words, toy_checkpoints, tmp_path):
    path = tmp_path / "global_step2"
    shutil.copytree(toy_checkpoints / setting / "global_step2", path)
    damage(path, toy_checkpoints)
    with pytest.raises(CheckpointError, match=words):
        ZeroCheckpoint(path)


def test_sizes_are_held_against_the_manifest_where_there_is_one(toy_checkpoints, tmp_path):
    path = tmp_path / "iter_2"
    shutil.copytree(toy_checkpoints / "zero3_bf16/global_step2", path)
    assert ZeroCheckpoint(path).manifest == {}
    write_manifest(
        path, SaveRecord(step=2, world_size=2, zero_stage=3, meta={"CLASSES": ["sky"]}, metrics={"mIoU": 0.5})
    )
    assert ZeroCheckpoint(path).manifest["meta"] == {"CLASSES": ["sky"]}
    cut(only(path, "*rank_1*optim*"))
    with pytest.raises(CheckpointError, match=r"rank_1.*optim_states\.pt has [\d,]+ bytes"):
        ZeroCheckpoint(path)


@EVERY
@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_with_its_own_files_alone_reads_what_its_process_saved(name, rank, toy_checkpoints, tmp_path):
    """As with node-local storage: the shards of the other rank are gone."""
    whole = ZeroCheckpoint.open(toy_checkpoints / name)
    path = tmp_path / "iter_2"
    shutil.copytree(whole.path, path)
    for file in path.glob(f"*zero_pp_rank_{1 - rank}_*"):
        file.unlink()
    write_manifest(path, SaveRecord(step=2, world_size=2, zero_stage=whole.stage, node_local=True))
    with pytest.raises(CheckpointError, match="folders of all hosts"):
        ZeroCheckpoint(path)
    here = ZeroCheckpoint(path, partial=True)
    assert here.ranks == (rank,) and here.trained == whole.trained
    # a second name, which only rank 0's file of ZeRO-3 knows
    assert whole.shapes.keys() - here.shapes.keys() <= {"tied_head.weight"}
    mine = elsewhere = 0
    for parameter, shape in here.shapes.items():
        for index in range(shape.numel()):
            for what in ("fp32", "exp_avg") if parameter in whole.trained else ("fp32",):
                try:
                    value = here.read_slice(parameter, index, index + 1, what)
                except CheckpointError as error:
                    assert f"lacks the files of rank {1 - rank}" in str(error)
                    elsewhere += 1
                else:  # under ZeRO-1 and 2 the weights of the other rank are what this one computed with
                    expected = whole.read_slice(parameter, index, index + 1, what)
                    assert torch.equal(value, expected) or (
                        what == "fp32" and whole.stage < 3 and torch.equal(value, expected.bfloat16().float())
                    )
                    mine += 1
    assert mine and elsewhere


def test_without_a_manifest_that_says_so_every_file_must_be_there(toy_checkpoints, tmp_path):
    path = tmp_path / "iter_2"
    shutil.copytree(ZeroCheckpoint.open(toy_checkpoints / "zero3_bf16").path, path)
    next(path.glob("*zero_pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        ZeroCheckpoint(path, partial=True)
