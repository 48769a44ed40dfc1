"""Saves that are killed, and saves that find no room: what was saved before stays usable, and is found."""

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import deepspeed  # here: the processes of a try are forked, and do not import it again
import pytest
import torch
import torch.distributed as dist

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.resume.find_checkpoint import checkpoint_to_resume, find_checkpoint
from internseg_ds.training.train_state import TrainState
from tests.conftest import free_port
from tests.distributed.ranks import spawn

SIZE = 2**18


def toy_engine(background: bool = False):
    model = torch.nn.Linear(SIZE // 64, 64, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )[0]
    engine.checkpoint_engine = NotingCheckpointEngine(engine._config, background=background)
    return engine


def saves_for_ever(rank: int, port: int, folder: Path, first: int, background: bool) -> None:
    """Weights of step n are all n; saves one step after the other until somebody kills it."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    deepspeed.init_distributed(verbose=False)
    engine, checkpoints, step = toy_engine(background), Checkpointer(folder, keep=2), first
    (folder.parent / f"ready_{port}_{rank}").touch()
    while True:
        step += 1
        for master in engine.optimizer.single_partition_of_fp32_groups:
            master.data.fill_(step)
        checkpoints.save(engine, TrainState(step=step, images=8 * step), {"CLASSES": ["sky"]})


@pytest.mark.parametrize(
    ("background", "tries"),
    [
        # the seconds of 12 are spent with the other long tests
        (False, 4),
        (True, 3),
        pytest.param(False, 12, marks=pytest.mark.slow),
    ],
)
def test_a_save_killed_at_any_moment_leaves_the_previous_one_usable(background, tries, tmp_path):
    folder, newest, chance = tmp_path / "checkpoints", 0, random.Random(0)
    forked = multiprocessing.get_context("fork")
    for _ in range(tries):
        port = free_port()
        ranks = [
            forked.Process(target=saves_for_ever, args=(rank, port, folder, newest, background))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 120
        # while DeepSpeed's extension is loaded, a kill would leave torch's lock behind, for which all later
        # tests would wait; and before the first save there is nothing to keep
        while (
            not all((tmp_path / f"ready_{port}_{rank}").exists() for rank in range(2))
            or not (folder / "latest").exists()
        ):
            assert time.monotonic() < deadline and all(process.is_alive() for process in ranks)
            time.sleep(0.01)
        time.sleep(chance.uniform(0.2, 1.5))
        for process in chance.sample(ranks, 2):
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        found = checkpoint_to_resume("auto", tmp_path)
        checkpoint = ZeroCheckpoint(found)
        step = checkpoint.client_state["internseg_ds"]["step"]
        assert step >= newest and found.name == f"iter_{step}" and checkpoint.manifest["step"] == step
        assert torch.equal(checkpoint.read("weight"), torch.full((64, SIZE // 64), float(step)))
        newest = step
    assert newest > tries / 2  # it did save between the kills


def a_save_without_room_does_not_end_the_training(folder: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    engine, checkpoints = toy_engine(), Checkpointer(folder, keep=1)
    assert checkpoints.save(engine, TrainState(step=1), {}) == folder / "iter_1"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:  # one rank cannot write any more, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    assert checkpoints.save(engine, TrainState(step=2), {}) is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()  # rank 0 clears away
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["iter_1"] and (
        folder / "latest"
    ).read_text() == "iter_1"
    dist.barrier()
    # what was not saved cannot be the best
    assert checkpoints.score(TrainState(step=2), {"mIoU": 1.0}, "mIoU") is False
    assert checkpoints.save(engine, TrainState(step=3), {}) == folder / "iter_3"


def a_save_in_the_background_holds_the_moment_of_the_call(folder: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    engine, checkpoints = toy_engine(background=True), Checkpointer(folder, keep=2)
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    for step in (1, 2):
        master.data.fill_(step)
        assert checkpoints.save(engine, TrainState(step=step), {}) == folder / f"iter_{step}"
        master.data.fill_(99)  # the training goes on
    assert find_checkpoint(folder).name == "iter_1"  # published before the next save began
    while not (folder / "iter_2").is_dir():
        checkpoints.finish(wait=False)
    dist.barrier()
    for step in (1, 2):
        assert torch.equal(
            ZeroCheckpoint(folder / f"iter_{step}").read("weight"), torch.full((64, SIZE // 64), float(step))
        )


def test_a_save_in_the_background_holds_the_moment_of_the_call(tmp_path):
    spawn(a_save_in_the_background_holds_the_moment_of_the_call, 1, tmp_path / "checkpoints")


def test_a_save_without_room_does_not_end_the_training(tmp_path):
    spawn(a_save_without_room_does_not_end_the_training, 2, tmp_path / "checkpoints")


def a_full_disk_is_noticed_before_the_first_byte(folder: Path) -> None:
    import shutil
    from types import SimpleNamespace

    deepspeed.init_distributed(verbose=False)
    engine, checkpoints = toy_engine(), Checkpointer(folder, keep=1)
    real, shutil.disk_usage = shutil.disk_usage, lambda _: SimpleNamespace(free=2**20)
    assert checkpoints.save(engine, TrainState(step=1), {}) is None
    assert list(folder.iterdir()) == []
    shutil.disk_usage = real


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_is_noticed_before_the_first_byte(world_size, tmp_path):
    spawn(a_full_disk_is_noticed_before_the_first_byte, world_size, tmp_path / "checkpoints")
