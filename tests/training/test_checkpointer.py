"""The checkpoints folder of a run: what is named, what is kept, and what a second run in the same folder
does."""

import json
import os
from pathlib import Path
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist

from internseg_ds.checkpoints.manifest import MANIFEST, read_manifest
from internseg_ds.checkpoints.saves import complete_saves
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.errors import CheckpointError
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.resume.find_checkpoint import checkpoint_to_resume, find_checkpoint
from internseg_ds.training.train_state import TrainState
from tests.distributed.ranks import spawn


def toy_engine():
    deepspeed.init_distributed(verbose=False)
    model = torch.nn.Linear(4, 3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )[0]
    engine.checkpoint_engine = NotingCheckpointEngine(engine._config)
    return engine


def saves_of_a_model_with_frozen_weights(folder: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    for stage in (1, 2, 3):
        model = torch.nn.Sequential(torch.nn.Linear(2000, 1000), torch.nn.Linear(1000, 500))
        model[0].requires_grad_(False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
        }
        trained = torch.optim.AdamW(model[1].parameters())
        engine = deepspeed.initialize(model=model, optimizer=trained, config=config)[0]
        engine.checkpoint_engine = NotingCheckpointEngine(engine._config)
        engine.backward(engine(torch.ones(1, 2000, dtype=torch.bfloat16)).float().sum())
        engine.step()
        checkpoints = Checkpointer(folder / str(stage), keep=1)
        saved = checkpoints.save(engine, TrainState(step=1), {})
        found = sum(file.stat().st_size for file in saved.iterdir())
        room = checkpoints._bytes_to_save(engine, None) - 2**20
        # the scripts and names that lie in each checkpoint come to some hundred kB
        assert 0.95 * found - 200_000 < room < 1.05 * found, (stage, room, found)


def test_the_room_that_a_save_needs_is_known_with_frozen_weights_too(tmp_path):
    spawn(saves_of_a_model_with_frozen_weights, 2, tmp_path)


def test_frozen_weights_that_deepspeed_gives_twice_are_written_once(tmp_path):
    module = {"trained": torch.ones(10), "frozen": torch.rand(1000, 1000)}
    of_a_gpu = {"module": module, "frozen_param_fragments": {"frozen": module["frozen"].clone()}}
    partitioned = {
        "module": {"frozen": torch.empty(0)},
        "frozen_param_fragments": {"frozen": torch.rand(10**6)},
    }
    for background in (False, True):
        writer = NotingCheckpointEngine(None, background=background)
        for number, state in enumerate((of_a_gpu, partitioned)):
            file = tmp_path / f"{number}_{background}.pt"
            writer.save(state, str(file))
            assert writer.wait() is None
            assert 4_000_000 < file.stat().st_size < 4_100_000
            again = torch.load(file)["frozen_param_fragments"]["frozen"]
            assert torch.equal(again, state["frozen_param_fragments"]["frozen"])


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def the_newest_and_the_best_stay(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=2), TrainState()
    for step, score in ((10, 0.1), (20, 0.7), (30, 0.3), (40, 0.4), (50, 0.5)):
        state.step = step
        checkpoints.save(engine, state, {"CLASSES": ["sky"]})
        assert checkpoints.score(state, {"mIoU": score, "mAcc": 1 - score}, "mIoU") is (score in (0.1, 0.7))
    assert there(folder) == {"iter_20", "iter_40", "iter_50"}
    assert (folder / "latest").read_text() == "iter_50" and (folder / "best").read_text() == "iter_20"
    assert read_manifest(folder / "iter_20")["metrics"] == {"mIoU": 0.7, "mAcc": 0.30000000000000004}
    assert find_checkpoint(folder) == folder / "iter_50"


def another_run_in_the_same_folder_removes_its_own_saves_alone(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=2), TrainState(step=4000, run="one")
    checkpoints.save(engine, state, {})
    state = TrainState(run="another")
    for step in (1000, 2000, 3000):
        state.step = step
        checkpoints.save(engine, state, {})
        assert (
            find_checkpoint(folder) == checkpoint_to_resume("auto", folder.parent) == folder / f"iter_{step}"
        )
    assert there(folder) == {"iter_2000", "iter_3000", "iter_4000"}
    checkpoints.save(engine, state, {})  # the same step again replaces it
    assert there(folder) == {"iter_2000", "iter_3000", "iter_4000"}


def a_clock_that_goes_back_removes_no_new_save(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=2), TrainState()
    for step, now in ((10, 9000.0), (20, 9100.0), (30, 1900.0), (40, 2000.0)):
        state.step = step
        with mock.patch("internseg_ds.training.checkpointer.time.time", lambda now=now: now):
            checkpoints.save(engine, state, {})
        (folder / "latest").unlink()  # what is newest is told without it, too
        assert checkpoint_to_resume("auto", folder.parent) == folder / f"iter_{step}"
    assert there(folder) == {"iter_30", "iter_40"}


def what_latest_and_best_name_stays_whatever_the_order_says(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=1), TrainState()
    for step in (10, 20):
        state.step = step
        checkpoints.save(engine, state, {})
    # of before there were checksums
    future = read_manifest(folder / "iter_20") | {"format": 1, "number": 1000}
    (folder / "iter_20" / MANIFEST).write_text(json.dumps(future))
    state.step = 30
    checkpoints.save(engine, state, {})
    assert there(folder) == {"iter_30"} and read_manifest(folder / "iter_30")["number"] == 1001


def a_damaged_neighbour_costs_no_save(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=2), TrainState()
    notes = (
        "[]",
        "null",
        "{",
        "[" * 100_000,
        "{}",
        '{"step": "x"}',
        '{"step": 9, "number": []}',
        '{"step": 9, "metrics": {"mIoU": "high"}}',
        '{"step": 9, "files": {"../outside": 1}}',
        '{"step": 9, "files": {"/outside": 1}}',
        '{"step": 9, "files": {"a": "b"}}',
        '{"step": 9, "groups": [{"names": ["a"]}]}',
    )
    for number, note in enumerate(notes):
        (folder / f"iter_9{number}").mkdir(parents=True)
        (folder / f"iter_9{number}" / MANIFEST).write_text(note)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_manifest(folder / f"iter_9{number}")
    (folder / "iter_89").mkdir()
    os.mkfifo(folder / "iter_89" / MANIFEST)  # nobody waits for what may never come
    (folder / "iter_10").write_text("a file that has the name of the next save")
    (folder / "iter_20.partial").write_text("a leftover that is no folder")
    for pointer in ("latest", "best"):
        (folder / pointer).write_bytes(b"\xff\x00\x01")
    for step in (10, 20, 30):
        state.step = step
        assert checkpoints.save(engine, state, {}) == folder / f"iter_{step}"
        assert checkpoint_to_resume("auto", folder.parent) == folder / f"iter_{step}"
    assert (
        {"iter_20", "iter_30"} < there(folder)
        and "iter_10" not in there(folder)
        and len(there(folder)) == len(notes) + 3
    )
    for pointed in [f"iter_9{number}" for number in range(len(notes))] + ["iter_89", "iter_8"]:
        (folder / "best").write_text(pointed)
        checkpoints.recall_best(state, "mIoU")
        assert state.best is None
    (folder / "best").unlink()
    os.mkfifo(folder / "best")
    checkpoints.recall_best(state, "mIoU")
    assert not list(folder.glob("*.partial"))


def an_old_save_that_cannot_be_removed_costs_no_training(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=1), TrainState()
    with mock.patch(
        "internseg_ds.checkpoints.saves.shutil.rmtree", side_effect=OSError(16, "Device or resource busy")
    ):
        for step in (10, 20):
            state.step = step
            assert checkpoints.save(engine, state, {}) == folder / f"iter_{step}"
    assert {path.name for path in complete_saves(folder)} == {"iter_20"} and there(folder) == {
        "iter_20",
        "iter_10.removed.partial",
    }
    state.step = 30
    checkpoints.save(engine, state, {})
    assert there(folder) == {"iter_30"}


def auto_goes_on_from_the_one_before_a_damaged_newest(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=-1), TrainState()
    for step in (10, 20, 30):
        state.step = step
        checkpoints.save(engine, state, {})
    next((folder / "iter_30").glob("*optim_states.pt")).unlink()
    assert checkpoint_to_resume("auto", folder.parent) == folder / "iter_20"
    (folder / "iter_20" / MANIFEST).write_text("{")
    assert checkpoint_to_resume("auto", folder.parent) == folder / "iter_10"
    next((folder / "iter_10").glob("*optim_states.pt")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"iter_30.*missing.*2 checkpoints"):
        checkpoint_to_resume("auto", folder.parent)


def a_pointer_is_not_followed_out_of_its_folder(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=-1), TrainState(step=10)
    checkpoints.save(engine, state, {})
    outside = folder.parent / "outside"
    (folder / "iter_10").rename(outside)
    checkpoints.save(engine, state, {})
    for name in ("../outside", str(outside), "..", "", "iter_10\niter_11", "x" * 300):
        (folder / "latest").write_text(name)
        assert checkpoint_to_resume("auto", folder.parent) == folder / "iter_10"
        with pytest.raises(CheckpointError, match="no name of a checkpoint"):
            find_checkpoint(folder)


def a_resumed_run_knows_the_best_score_so_far(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=-1), TrainState()
    for step, score in ((10, 0.9), (20, 0.2)):
        state.step = step
        checkpoints.save(engine, state, {})
        checkpoints.score(state, {"mIoU": score}, "mIoU")
    late, early = TrainState(step=20), TrainState(step=5)
    checkpoints.recall_best(late, "mIoU")
    # resumed from before the best: that score is of a future that will not be
    checkpoints.recall_best(early, "mIoU")
    assert (late.best, late.best_tag, early.best) == (0.9, "iter_10", None)


def a_half_written_save_is_cleared_away(folder: Path) -> None:
    engine, checkpoints = toy_engine(), Checkpointer(folder, keep=2)
    if dist.get_rank() == 0:
        (folder / "iter_6.partial").mkdir(parents=True)
    checkpoints.tidy()  # at the start of a run
    assert there(folder) == set()
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "iter_7.partial").mkdir(parents=True)
        (folder / "iter_7.partial" / "shard.pt").write_bytes(b"half")
    dist.barrier()
    checkpoints.save(engine, TrainState(step=8), {})
    assert there(folder) == {"iter_8"}


def test_the_newest_and_the_best_stay(tmp_path):
    spawn(the_newest_and_the_best_stay, 2, tmp_path / "checkpoints")


def several(folder: Path) -> None:
    for proof in (
        another_run_in_the_same_folder_removes_its_own_saves_alone,
        a_clock_that_goes_back_removes_no_new_save,
        what_latest_and_best_name_stays_whatever_the_order_says,
        a_damaged_neighbour_costs_no_save,
        an_old_save_that_cannot_be_removed_costs_no_training,
        auto_goes_on_from_the_one_before_a_damaged_newest,
        a_pointer_is_not_followed_out_of_its_folder,
    ):
        proof(folder / proof.__name__ / "checkpoints")


def test_what_lies_beside_a_save_is_neither_lost_nor_costs_it(tmp_path):
    spawn(several, 1, tmp_path)


def test_a_resumed_run_knows_the_best_score_so_far(tmp_path):
    spawn(a_resumed_run_knows_the_best_score_so_far, 1, tmp_path / "checkpoints")


def test_a_half_written_save_is_cleared_away(tmp_path):
    spawn(a_half_written_save_is_cleared_away, 2, tmp_path / "checkpoints")


def the_pointer_is_lost(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpointer(folder, keep=-1), TrainState()
    for step in (9, 10):
        state.step = step
        checkpoints.save(engine, state, {})
    for damage in (
        lambda: (folder / "latest").write_text("iter_11"),
        lambda: (folder / "latest").write_text(""),
        lambda: (folder / "latest").unlink(),
    ):
        damage()
        assert checkpoint_to_resume("auto", folder.parent) == folder / "iter_10"


def test_resume_auto_finds_the_newest_when_the_pointer_is_lost(tmp_path):
    spawn(the_pointer_is_lost, 1, tmp_path / "checkpoints")


def test_resume_auto_is_a_fresh_start_where_nothing_was_saved(tmp_path):
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert checkpoint_to_resume(None, tmp_path) is None
