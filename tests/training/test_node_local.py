"""Hosts whose folders have the same path and are not the same: here every rank is a host, and its folder
bears its number."""

import os
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from internseg_ds.checkpoints.manifest import read_manifest
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import CheckpointError, ConfigError
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.resume.find_checkpoint import agree_to_resume, checkpoint_to_resume
from internseg_ds.training.train_state import TrainState
from internseg_ds.training.work_dir import find_leaders
from tests.distributed.ranks import spawn
from tests.training.test_checkpointer import there


def world(ranks_per_host: int = 1) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank % ranks_per_host)


def who_looks_after_which_folder(place: Path) -> None:
    rank = dist.get_rank()
    assert find_leaders(place / "shared", world(), node_local=False, ds_config="ds.json") == [0, 0, 0]
    # allowed, but not so
    assert find_leaders(place / "shared", world(), node_local=True, ds_config="ds.json") == [0, 0, 0]
    assert find_leaders(place / f"host{rank // 2}", world(2), node_local=True, ds_config="ds.json") == [
        0,
        0,
        2,
    ]
    with pytest.raises(
        ConfigError,
        match=r'shared file system.*"use_node_local_storage": true.*ds\.json',
    ):
        find_leaders(place / f"host{rank // 2}", world(2), node_local=False, ds_config="ds.json")
    dist.barrier()
    assert not list(place.glob("*/.*"))  # no marks are left


def test_one_process_looks_after_each_folder_that_there_is(tmp_path):
    spawn(who_looks_after_which_folder, 3, tmp_path)


def engine_of_a_host() -> deepspeed.DeepSpeedEngine:
    os.environ["LOCAL_RANK"] = "0"
    deepspeed.init_distributed(verbose=False)
    model = torch.nn.Linear(4, 3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "checkpoint": {"use_node_local_storage": True},
    }
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )[0]
    engine.checkpoint_engine = NotingCheckpointEngine(engine._config)
    return engine


def checkpoints_of(place: Path, keep: int = -1) -> tuple[Checkpointer, Path]:
    mine = place / f"host{dist.get_rank()}"
    return Checkpointer(
        mine / "checkpoints", keep, find_leaders(mine, world(), node_local=True, ds_config="")
    ), mine


def every_host_saves_marks_and_retains(place: Path) -> None:
    engine, state, (checkpoints, mine) = engine_of_a_host(), TrainState(), checkpoints_of(place, keep=1)
    for step, score in ((10, 0.1), (20, 0.7), (30, 0.3)):
        state.step = step
        checkpoints.save(engine, state, {"CLASSES": ["sky"]})
        checkpoints.score(state, {"mIoU": score}, "mIoU")
    assert there(mine / "checkpoints") == {"iter_20", "iter_30"}
    assert ((mine / "checkpoints" / "latest").read_text(), (mine / "checkpoints" / "best").read_text()) == (
        "iter_30",
        "iter_20",
    )
    manifest = read_manifest(mine / "checkpoints" / "iter_30")
    assert (
        manifest["node_local"]
        and any(f"rank_{dist.get_rank()}_" in name for name in manifest["files"])
        and not any(f"rank_{1 - dist.get_rank()}_" in name for name in manifest["files"])
    )
    assert agree_to_resume(checkpoint_to_resume("auto", mine), 1).path == mine / "checkpoints" / "iter_30"


def hosts_whose_newest_differ_agree(place: Path) -> None:
    engine, state, (checkpoints, mine) = engine_of_a_host(), TrainState(), checkpoints_of(place)
    for step in (10, 20, 30):
        state.step = step
        checkpoints.save(engine, state, {})
    if dist.get_rank() == 1:  # killed between the publishing of one host and of the other
        (mine / "checkpoints" / "iter_30").rename(mine / "checkpoints" / "iter_30.partial")
        (mine / "checkpoints" / "latest").write_text("iter_20")
    found = checkpoint_to_resume("auto", mine)
    assert found.name == ("iter_20" if dist.get_rank() else "iter_30")
    assert agree_to_resume(found, 1).path == mine / "checkpoints" / "iter_20"
    with pytest.raises(CheckpointError, match=r"2 processes under ZeRO-2"):
        agree_to_resume(found, 2)
    if dist.get_rank() == 1:  # damaged where the others do not see it
        next((mine / "checkpoints" / "iter_20").glob("*optim_states.pt")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"on \S+: .*truncated"):
        agree_to_resume(found, 1)
    if dist.get_rank() == 1:
        shutil.rmtree(mine / "checkpoints")
    with pytest.raises(
        CheckpointError,
        match=r"\(\S+ iter_30, \S+ none\)",
    ):
        agree_to_resume(checkpoint_to_resume("auto", mine), 1)


def the_same_step_of_another_save_is_not_the_same(place: Path) -> None:
    engine, (checkpoints, mine) = engine_of_a_host(), checkpoints_of(place)
    checkpoints.save(engine, TrainState(step=10), {})
    checkpoints.save(engine, TrainState(step=20), {})
    if dist.get_rank() == 1:
        shutil.copytree(mine / "checkpoints" / "iter_20", place / "old")
    checkpoints.save(engine, TrainState(step=20), {})
    if dist.get_rank() == 1:
        shutil.rmtree(mine / "checkpoints" / "iter_20")
        (place / "old").rename(mine / "checkpoints" / "iter_20")
    assert agree_to_resume(checkpoint_to_resume("auto", mine), 1).path.name == "iter_10"


def a_save_that_fails_on_one_host_is_on_none(place: Path) -> None:
    engine, (checkpoints, mine) = engine_of_a_host(), checkpoints_of(place)
    assert checkpoints.save(engine, TrainState(step=10), {}) == mine / "checkpoints" / "iter_10"
    if dist.get_rank() == 1:
        writer = engine.checkpoint_engine
        writer._write = lambda state, path: setattr(writer, "failure", OSError("no room"))
    assert checkpoints.save(engine, TrainState(step=20), {}) is None
    assert (
        there(mine / "checkpoints") == {"iter_10"}
        and (mine / "checkpoints" / "latest").read_text() == "iter_10"
    )


def with_a_folder_on_each_host(place: Path) -> None:
    for proof in (
        every_host_saves_marks_and_retains,
        hosts_whose_newest_differ_agree,
        the_same_step_of_another_save_is_not_the_same,
        a_save_that_fails_on_one_host_is_on_none,
    ):
        proof(place / proof.__name__)


def test_with_a_folder_on_each_host_checkpoints_are_on_all_of_them(tmp_path):
    spawn(with_a_folder_on_each_host, 2, tmp_path)
