"""Disks that fill while something is written, by bytes and by inodes: what did not fit is lost or comes later, and the training goes on. Needs leave to mount."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist

from internseg_ds.checkpoints.saves import complete_saves
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.checkpoint_engine import note_failed_writes
from internseg_ds.engine.checkpointing import Checkpoints
from internseg_ds.engine.state import TrainState
from tests.distributed.ranks import spawn

SIZE = 2**14


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """small_disk(size="4m", inodes=100) -> Path: a file system of that size."""
    mounted = []

    def mount(*, size: str = "4m", inodes: int = 1000) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def leave(disk: Path, *, free_bytes: int | None = None, free_inodes: int | None = None) -> None:
    """Fills a disk to so much."""
    filler = disk / "filler"
    filler.mkdir()
    if free_inodes is not None:
        for number in range(os.statvfs(disk).f_ffree - free_inodes):
            (filler / str(number)).touch()
    if free_bytes is not None:
        with (filler / "bytes").open("wb") as file:
            file.write(bytes(max(0, shutil.disk_usage(disk).free - free_bytes)))


def toy_engine(background: bool):
    deepspeed.init_distributed(verbose=False)
    model = torch.nn.Linear(SIZE // 64, 64, bias=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
    note_failed_writes(engine, background=background)
    return engine


def saves_while_the_disk_fills(disk: Path, background: bool, fills: list[dict[str, int]]) -> None:
    """The look for room beforehand says that there is plenty, as it does where the disk fills after it."""
    engine, checkpoints, is_main = toy_engine(background), Checkpoints(disk / "checkpoints", keep=1), dist.get_rank() == 0
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    steps = iter(range(1, 1000))

    def save() -> tuple[int, Path | None]:
        step = next(steps)
        master.data.fill_(step)
        with mock.patch("internseg_ds.engine.checkpointing.shutil.disk_usage", lambda _: SimpleNamespace(free=2**40)):
            path = checkpoints.save(engine, TrainState(step=step), {})
            checkpoints.finish()
        return step, path

    saved, _ = save()
    lost = 0
    for fill in fills:
        if is_main:
            leave(disk, **fill)
        dist.barrier()
        step, _ = save()
        if is_main:
            shutil.rmtree(disk / "filler")
            assert not list(checkpoints.folder.glob("*.partial"))
        dist.barrier()
        newest = complete_saves(checkpoints.folder)[-1]
        assert newest.name == checkpoints.newest and newest.name in (f"iter_{saved}", f"iter_{step}"), (fill, newest)
        lost += newest.name == f"iter_{saved}"
        saved = int(newest.name.removeprefix("iter_"))
        assert torch.equal(ZeroCheckpoint(newest).read("weight"), torch.full((64, SIZE // 64), float(saved)))
        dist.barrier()
    assert len(fills) / 2 < lost < len(fills)
    step, _ = save()
    assert (checkpoints.folder / "latest").read_text() == f"iter_{step}"


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_disk_that_fills_during_a_save_costs_the_save_alone(background, small_disk):
    fills = [{"free_bytes": pages * 4096} for pages in (0, 1, 2, 5, 8, 11, 13, 15, 17, 19, 21)] + [{"free_inodes": number} for number in range(8)]
    spawn(saves_while_the_disk_fills, 2, small_disk(), background, fills)
