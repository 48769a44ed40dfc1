"""The checkpoints folder of a run: what is named, what is kept, and what a second run in the same folder does."""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from internseg_ds.checkpoints.manifest import read_manifest
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.engine.checkpointing import Checkpoints
from internseg_ds.engine.resuming import checkpoint_to_resume, find_checkpoint
from internseg_ds.engine.state import TrainState
from tests.distributed.ranks import spawn


def toy_engine():
    deepspeed.init_distributed(verbose=False)
    model = torch.nn.Linear(4, 3)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
    engine.checkpoint_engine = NotingCheckpointEngine(engine._config)
    return engine


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def the_newest_and_the_best_stay(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpoints(folder, keep=2), TrainState()
    for step, score in ((10, 0.1), (20, 0.7), (30, 0.3), (40, 0.4), (50, 0.5)):
        state.step = step
        checkpoints.save(engine, state, {"CLASSES": ["sky"]})
        assert checkpoints.score(state, {"mIoU": score, "mAcc": 1 - score}, "mIoU") is (score in (0.1, 0.7))
    assert there(folder) == {"iter_20", "iter_40", "iter_50"}
    assert (folder / "latest").read_text() == "iter_50" and (folder / "best").read_text() == "iter_20"
    assert read_manifest(folder / "iter_20")["metrics"] == {"mIoU": 0.7, "mAcc": 0.30000000000000004}
    assert find_checkpoint(folder) == folder / "iter_50"


def another_run_in_the_same_folder_keeps_what_it_saves(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpoints(folder, keep=2), TrainState(step=3000)
    for step in (3000, 4000):
        state.step = step
        checkpoints.save(engine, state, {})
    state = TrainState()
    for step in (1000, 2000):
        state.step = step
        checkpoints.save(engine, state, {})
        assert find_checkpoint(folder) == folder / f"iter_{step}"
    assert there(folder) == {"iter_1000", "iter_2000"}
    checkpoints.save(engine, state, {})  # the same step again replaces it
    assert there(folder) == {"iter_1000", "iter_2000"}


def a_resumed_run_knows_the_best_score_so_far(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpoints(folder, keep=-1), TrainState()
    for step, score in ((10, 0.9), (20, 0.2)):
        state.step = step
        checkpoints.save(engine, state, {})
        checkpoints.score(state, {"mIoU": score}, "mIoU")
    late, early = TrainState(step=20), TrainState(step=5)
    checkpoints.recall_best(late, "mIoU")
    checkpoints.recall_best(early, "mIoU")  # resumed from before the best: that score is of a future that will not be
    assert (late.best, late.best_tag, early.best) == (0.9, "iter_10", None)


def a_half_written_save_is_cleared_away(folder: Path) -> None:
    engine, checkpoints = toy_engine(), Checkpoints(folder, keep=2)
    if dist.get_rank() == 0:
        (folder / "iter_7.partial").mkdir(parents=True)
        (folder / "iter_7.partial" / "shard.pt").write_bytes(b"half")
    dist.barrier()
    checkpoints.save(engine, TrainState(step=8), {})
    assert there(folder) == {"iter_8"}


def test_the_newest_and_the_best_stay(tmp_path):
    spawn(the_newest_and_the_best_stay, 2, tmp_path / "checkpoints")


def test_another_run_in_the_same_folder_keeps_what_it_saves(tmp_path):
    spawn(another_run_in_the_same_folder_keeps_what_it_saves, 1, tmp_path / "checkpoints")


def test_a_resumed_run_knows_the_best_score_so_far(tmp_path):
    spawn(a_resumed_run_knows_the_best_score_so_far, 1, tmp_path / "checkpoints")


def test_a_half_written_save_is_cleared_away(tmp_path):
    spawn(a_half_written_save_is_cleared_away, 2, tmp_path / "checkpoints")


def the_pointer_is_lost(folder: Path) -> None:
    engine, checkpoints, state = toy_engine(), Checkpoints(folder, keep=-1), TrainState()
    for step in (9, 10):
        state.step = step
        checkpoints.save(engine, state, {})
    for damage in (lambda: (folder / "latest").write_text("iter_11"), lambda: (folder / "latest").write_text(""), lambda: (folder / "latest").unlink()):
        damage()
        assert checkpoint_to_resume("auto", folder.parent) == folder / "iter_10"


def test_resume_auto_finds_the_newest_when_the_pointer_is_lost(tmp_path):
    spawn(the_pointer_is_lost, 1, tmp_path / "checkpoints")


def test_resume_auto_is_a_fresh_start_where_nothing_was_saved(tmp_path):
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert checkpoint_to_resume(None, tmp_path) is None
