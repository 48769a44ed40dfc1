"""Resuming where saves are damaged in what is read last: all ranks say so, and go on from the one before, or from none."""

import dataclasses
import logging
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from internseg_ds import SegmentorEngine
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.engine.checkpointing import Checkpoints
from internseg_ds.engine.experiment import read_experiment
from internseg_ds.engine.resuming import agree_to_resume, checkpoint_to_resume
from internseg_ds.engine.state import TrainState
from internseg_ds.errors import CheckpointError
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.engine.small import small_experiment
from tests.engine.test_node_local import checkpoints_of, engine_of_a_host

WIDTH = 2**21  # a rank has 4 MiB of each kind: opening a file reads its first and its last one


def damage_weights(save: Path, rank: int = 0) -> None:
    """Flips a bit of the masters, in the middle, which only the rank that goes on with them reads."""
    checkpoint = ZeroCheckpoint(save, partial=True)
    stored = checkpoint._flat["fp32"][rank][0]
    with stored.path.open("r+b") as file:
        file.seek(stored.place + 4 * (stored.numel() // 2))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


def every_rank_goes_on_from_the_newest_whole_one(folder: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    model = torch.nn.Linear(WIDTH, 1, bias=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
    engine.checkpoint_engine = NotingCheckpointEngine(engine._config, background=True)
    checkpoints, main = Checkpoints(folder, keep=-1), dist.get_rank() == 0
    for step in (10, 20, 30):
        checkpoints.save(engine, TrainState(step=step), {})
    checkpoints.finish()

    def found(**how) -> str:
        dist.barrier()
        return agree_to_resume(checkpoint_to_resume("auto", folder.parent), 1, **how).path.name

    assert found(auto=True) == "iter_30"
    dist.barrier()
    if main:
        damage_weights(folder / "iter_30", rank=1)
    dist.barrier()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("internseg_ds").addHandler(handler)
    assert checkpoint_to_resume("auto", folder.parent).name == "iter_30"  # this part of it is whole
    assert found(auto=True) == "iter_20"
    assert any("rank_1" in line and "is not what was written" in line and "going on from the one before" in line for line in said) is main
    assert found(auto=True, check=False) == "iter_30"
    with pytest.raises(CheckpointError, match=r"iter_30.*rank_1.* is not what was written: the checksum of its bytes .* copy it again"):
        found()
    if main:
        shard = next((folder / "iter_20").glob("*rank_0*optim*"))
        data = bytearray(shard.read_bytes())
        data[100] ^= 1  # where torch has the names
        shard.write_bytes(data)
    assert found(auto=True) == "iter_10"
    if main:
        damage_weights(folder / "iter_10")
    with pytest.raises(CheckpointError, match=r"iter_30.*none of the checkpoints in .* is whole"):
        found(auto=True)


def test_every_rank_goes_on_from_the_newest_whole_one(tmp_path):
    spawn(every_rank_goes_on_from_the_newest_whole_one, 2, tmp_path / "checkpoints")


def what_is_damaged_on_one_host_is_taken_by_none(place: Path) -> None:
    engine, (checkpoints, mine) = engine_of_a_host(), checkpoints_of(place)
    for step in (10, 20):
        checkpoints.save(engine, TrainState(step=step), {})
    if dist.get_rank() == 1:
        damage_weights(mine / "checkpoints" / "iter_20", rank=1)
    found = checkpoint_to_resume("auto", mine)
    assert agree_to_resume(found, 1, auto=True).path == mine / "checkpoints" / "iter_10"
    with pytest.raises(CheckpointError, match=r"is not what was written.* \(on host "):
        agree_to_resume(found, 1)


def test_what_is_damaged_on_one_host_is_taken_by_none(tmp_path):
    spawn(what_is_damaged_on_one_host_is_taken_by_none, 2, tmp_path)


def a_run_goes_on_from_the_one_before(root: Path, work_dir: Path) -> None:
    cfg = small_experiment(root, "runner.max_iters=3", "checkpoint_config.interval=1", "checkpoint_config.max_keep_ckpts=-1")
    ds = ROOT / "ds_configs/zero1_bf16.json"
    with SegmentorEngine(cfg, ds, work_dir=work_dir, validate=False) as engine:
        engine.train()
    damage_weights(work_dir / "checkpoints" / "iter_3")
    with SegmentorEngine(cfg, ds, work_dir=work_dir, validate=False, resume="auto") as engine:
        assert engine.state.step == 2 and engine.checkpoints.newest == "iter_2"
    with pytest.raises(CheckpointError, match="is not what was written"):
        SegmentorEngine(cfg, ds, work_dir=work_dir, validate=False, resume=work_dir / "checkpoints" / "iter_3")
    experiment = read_experiment(cfg)
    unchecked = dataclasses.replace(experiment, engine=dataclasses.replace(experiment.engine, checksums=False))
    with SegmentorEngine(unchecked, ds, work_dir=work_dir, validate=False, resume="auto") as engine:
        assert engine.state.step == 3
    shutil.rmtree(work_dir)


def test_a_run_goes_on_from_the_one_before(ade20k, tmp_path):
    spawn(a_run_goes_on_from_the_one_before, 1, ade20k, tmp_path / "run")
