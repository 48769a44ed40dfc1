"""Resuming where saves are damaged: all ranks say so, and go on from the one before, or from none."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from internseg_ds import SegmentorEngine
from internseg_ds.checkpoints.manifest import MANIFEST
from internseg_ds.checkpoints.saves import publish
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import CheckpointError, ConfigError, DamagedError
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.resume.find_checkpoint import agree_to_resume, checkpoint_to_resume, one_before
from internseg_ds.training.train_state import TrainState
from internseg_ds.training.work_dir import check_unused
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment
from tests.training.test_checkpointer import toy_engine
from tests.training.test_node_local import checkpoints_of, engine_of_a_host


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


def damage(save: Path, what: str, rank: int = 0) -> None:
    """Flips a bit in the middle of a rank's values: where they are more than some MiB, what opens the file
    does not see it."""
    stored = ZeroCheckpoint(save, partial=True, check=False)._flat[what][rank][0]
    flip(stored.path, stored.place + 4 * (stored.numel() // 2))


def what_opening_sees_is_passed_over(folder: Path) -> None:
    engine, checkpoints = toy_engine(), Checkpointer(folder, keep=-1)
    for step in (10, 20, 30):
        checkpoints.save(engine, TrainState(step=step), {})
    damage(folder / "iter_30", "fp32")
    assert checkpoint_to_resume("auto", folder.parent).name == "iter_20"
    assert checkpoint_to_resume("auto", folder.parent, check=False).name == "iter_30"
    with pytest.raises(DamagedError, match=r"iter_30.*checksum"):
        ZeroCheckpoint(checkpoint_to_resume(folder / "iter_30", folder.parent))
    newest = agree_to_resume(folder / "iter_30", 1, check=False)
    assert one_before(newest, 1).path.name == "iter_20"
    damage(folder / "iter_20", "fp32")
    assert one_before(newest, 1).path.name == "iter_10"
    damage(folder / "iter_10", "fp32")
    assert one_before(newest, 1) is None
    with pytest.raises(CheckpointError, match=r"iter_30.*none of the 3 checkpoints"):
        checkpoint_to_resume("auto", folder.parent)


def saves_without_readable_notes_are_not_lost(folder: Path) -> None:
    engine, checkpoints = toy_engine(), Checkpointer(folder, keep=-1)
    for step in (10, 20):
        checkpoints.save(engine, TrainState(step=step), {})
    publish(folder / "latest", "iter_10")  # a full disk kept the newer from being named
    assert checkpoint_to_resume("auto", folder.parent).name == "iter_20"
    (folder / "latest").unlink()
    for save in (folder / "iter_10", folder / "iter_20"):
        (save / MANIFEST).write_text("")
    with pytest.raises(CheckpointError, match=r"\(iter_10, iter_20\).*--resume PATH.*--overwrite"):
        checkpoint_to_resume("auto", folder.parent)
    with pytest.raises(ConfigError, match=r"\(iter_10, iter_20 "):
        check_unused(folder.parent, None, overwrite=False, resumes=False)
    for save in (folder / "iter_10", folder / "iter_20"):
        shutil.rmtree(save)
    assert checkpoint_to_resume("auto", folder.parent) is None


def test_saves_without_readable_notes_are_not_lost(tmp_path):
    spawn(saves_without_readable_notes_are_not_lost, 1, tmp_path / "checkpoints")


def test_what_opening_sees_is_passed_over(tmp_path):
    spawn(what_opening_sees_is_passed_over, 1, tmp_path / "checkpoints")


def what_is_damaged_on_one_host_is_taken_by_none(place: Path) -> None:
    engine, (checkpoints, mine) = engine_of_a_host(), checkpoints_of(place)
    for step in (10, 20, 30):
        checkpoints.save(engine, TrainState(step=step), {})
    if dist.get_rank() == 1:
        damage(mine / "checkpoints" / "iter_30", "fp32", rank=1)
    found = checkpoint_to_resume("auto", mine)
    assert found.name == ("iter_20" if dist.get_rank() else "iter_30")
    agreed = agree_to_resume(found, 1)
    assert agreed.path == mine / "checkpoints" / "iter_20"
    if dist.get_rank() == 0:
        damage(mine / "checkpoints" / "iter_10", "fp32", rank=0)
    assert one_before(agreed, 1) is None
    with pytest.raises(CheckpointError, match=r"on \S+:.*iter_30"):
        agree_to_resume(mine / "checkpoints" / "iter_30", 1)


def test_what_is_damaged_on_one_host_is_taken_by_none(tmp_path):
    spawn(what_is_damaged_on_one_host_is_taken_by_none, 2, tmp_path)


WIDE = (
    "model.backbone.embed_dim=256",
    "model.decode_head.in_channels=[256,256,256,256]",
    "model.auxiliary_head.in_channels=256",
    "engine.ema=0.5",
)
"""A model of some million parameters: each rank has some MiB of each kind, of which opening a file reads the
first and the last."""


def kept_values(save: Path) -> dict[str, torch.Tensor]:
    checkpoint, weights = ZeroCheckpoint(save), open_weights(save)
    return {name: weights.read(name) for name in weights.shapes} | {
        f"{what} {name}": checkpoint.read_slice(name, 0, checkpoint.shapes[name].numel(), what)
        for name in checkpoint.trained
        for what in ("exp_avg", "exp_avg_sq", "ema")
    }


def every_rank_takes_up_the_one_before(root: Path, work_dir: Path, stage: int, thorough: bool) -> None:
    cfg = small_experiment(
        root,
        *WIDE,
        "runner.max_iters=2",
        "checkpoint_config.interval=1",
        "checkpoint_config.max_keep_ckpts=-1",
    )
    ds, main = ROOT / f"ds_configs/zero{stage}_bf16.json", dist.get_rank() == 0

    def resumed(config=cfg, resume="auto"):
        dist.barrier()
        return SegmentorEngine(config, ds, work_dir=work_dir, validate=False, resume=resume)

    with SegmentorEngine(cfg, ds, work_dir=work_dir, validate=False) as engine:
        engine.train()
    experiment = read_experiment(cfg)
    unchecked = dataclasses.replace(
        experiment, engine=dataclasses.replace(experiment.engine, checksums=False)
    )
    newest, before = work_dir / "checkpoints" / "iter_2", kept_values(work_dir / "checkpoints" / "iter_1")
    # read after the engine is there, and before
    for what in ("exp_avg", "fp32") if thorough else ("exp_avg",):
        if main:
            damage(newest, what, rank=1)
        dist.barrier()
        assert checkpoint_to_resume("auto", work_dir) == newest  # this part of it is whole
        with resumed() as engine:
            assert engine.state.step == 1 and engine.checkpoints.newest == "iter_1"
            assert Checkpointer(work_dir / "again", keep=-1).save(
                engine.deepspeed, engine.state, {}, (), engine.ema
            )
        found = kept_values(work_dir / "again" / "iter_1")
        assert found.keys() == before.keys()
        assert [name for name, value in found.items() if not torch.equal(value, before[name])] == []
        dist.barrier()
        lines = [
            line
            for line in (work_dir / "train.log").read_text().splitlines()
            if "rank_1" in line and "not what was written" in line
        ]
        assert lines and all("iter_1, the one before it" in line for line in lines)
        if not thorough:
            return
        with pytest.raises(
            DamagedError,
            match=r"rank_1.*checksum",
        ):
            resumed(resume=newest)
        with resumed(unchecked) as engine:
            assert engine.state.step == 2
    if main:
        damage(work_dir / "checkpoints" / "iter_1", "ema", rank=0)
    with pytest.raises(DamagedError, match=r"no checkpoint before it"):
        resumed()


@pytest.mark.parametrize(
    ("stage", "thorough"),
    [(3, False), *(pytest.param(stage, True, marks=pytest.mark.slow) for stage in (1, 2, 3))],
)
def test_every_rank_takes_up_the_one_before(stage, thorough, ade20k, tmp_path):
    spawn(every_rank_takes_up_the_one_before, 2, ade20k, tmp_path / "run", stage, thorough)
