"""Disks that fill while something is written, by bytes and by inodes: what did not fit is lost, or comes
later, and the training goes on.

The tests need leave to mount.
"""

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from mmseg.datasets.builder import PIPELINES

from internseg_ds.checkpoints.saves import complete_saves
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.checkpoint_engine import note_failed_writes
from internseg_ds.errors import CheckpointError
from internseg_ds.monitoring.loggers import open_loggers
from internseg_ds.monitoring.run_log import start_logging
from internseg_ds.monitoring.trackers.opening import open_trackers
from internseg_ds.training.checkpointer import Checkpointer, _shortage
from internseg_ds.training.segmentor_engine import SegmentorEngine
from internseg_ds.training.step_monitors import record
from internseg_ds.training.train_state import TrainState
from tests.conftest import ROOT, TINY, data_options
from tests.distributed.ranks import spawn
from tests.end_to_end.conftest import SMALL
from tests.monitoring.trackers.runs import run_info
from tests.small_experiment import small_experiment

SIZE = 2**14


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """small_disk(size="4m", inodes=100) -> Path: a file system of that size."""
    mounted = []

    def mount(*, size: str = "4m", inodes: int = 1000) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", place],
            capture_output=True,
            text=True,
        )
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
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )[0]
    note_failed_writes(engine, background=background)
    return engine


def saves_while_the_disk_fills(disk: Path, background: bool, fills: list[dict[str, int]]) -> None:
    """The look for room beforehand says that there is plenty, as it does where the disk fills after it."""
    engine, checkpoints, is_main = (
        toy_engine(background),
        Checkpointer(disk / "checkpoints", keep=1),
        dist.get_rank() == 0,
    )
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    steps = iter(range(1, 1000))

    def save() -> tuple[int, Path | None]:
        step = next(steps)
        master.data.fill_(step)
        with mock.patch(
            "internseg_ds.training.checkpointer.shutil.disk_usage", lambda _: SimpleNamespace(free=2**40)
        ):
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
        assert newest.name == checkpoints.newest and newest.name in (f"iter_{saved}", f"iter_{step}"), (
            fill,
            newest,
        )
        lost += newest.name == f"iter_{saved}"
        saved = int(newest.name.removeprefix("iter_"))
        assert torch.equal(ZeroCheckpoint(newest).read("weight"), torch.full((64, SIZE // 64), float(saved)))
        dist.barrier()
    assert len(fills) / 2 < lost < len(fills)
    step, _ = save()
    assert (checkpoints.folder / "latest").read_text() == f"iter_{step}"


def test_what_is_short_is_named_bytes_or_inodes(small_disk):
    disk = small_disk(inodes=20)
    assert re.search(rf"5 MiB and 4 MiB .*{disk}$", _shortage(disk, 5 * 2**20, 8))
    assert re.search(r"^not .*: .*1 MiB and 4 MiB", _shortage(disk, 2**20, 8))
    leave(disk, free_inodes=6)
    assert re.search(rf" 8 files .*{disk} .*inodes.* 6 \(df -i\)$", _shortage(disk, 2**20, 8))


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_disk_that_fills_during_a_save_costs_the_save_alone(background, small_disk):
    fills = [{"free_bytes": pages * 4096} for pages in (0, 1, 2, 5, 8, 11, 13, 15, 17, 19, 21)] + [
        {"free_inodes": number} for number in range(8)
    ]
    spawn(saves_while_the_disk_fills, 2, small_disk(), background, fills)


def saves_beside_what_is_busy_and_where_nothing_can_be_written(disk: Path) -> None:
    engine, checkpoints, folder = (
        toy_engine(False),
        Checkpointer(disk / "checkpoints", keep=1),
        disk / "checkpoints",
    )

    def mount(*words: object) -> None:
        if dist.get_rank() == 0:
            subprocess.run(["mount", *map(str, words)], check=True)
        dist.barrier()

    def saved(step: int) -> bool:
        path = checkpoints.save(engine, TrainState(step=step), {})
        assert path in (None, folder / f"iter_{step}")
        dist.barrier()
        return path is not None and complete_saves(folder)[-1] == path

    assert saved(1)
    # a mount point is busy: it can neither be renamed nor removed
    mount("--bind", folder / "iter_1", folder / "iter_1")
    assert saved(2) and saved(3)
    assert {path.name for path in complete_saves(folder)} == {"iter_1", "iter_3"}
    assert not saved(1)  # it cannot take that name
    assert saved(4)
    if dist.get_rank() == 0:
        (folder / "iter_5.partial").mkdir()
    dist.barrier()
    mount("--bind", folder / "iter_5.partial", folder / "iter_5.partial")
    assert not saved(5) and saved(6)
    mount("-o", "remount,ro", disk)
    assert not saved(7)
    checkpoints.tidy()
    assert checkpoints.score(TrainState(step=6), {"mIoU": 0.5}, "mIoU") is True  # not noted, and no end
    mount("-o", "remount,rw", disk)
    assert saved(8)


def test_what_is_busy_or_read_only_costs_a_save_at_most(small_disk):
    spawn(saves_beside_what_is_busy_and_where_nothing_can_be_written, 2, small_disk())


def test_records_catch_up_when_there_is_room_again(small_disk):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    disk, log = small_disk(), logging.getLogger("internseg_ds.training")
    start_logging(disk, level="INFO", is_main=True)
    with (
        open_loggers(disk, max_steps=9, start=0, is_main=True) as loggers,
        open_trackers([{"type": "TensorboardLoggerHook"}], run_info(disk)) as trackers,
    ):
        for step in range(1, 10):
            trackers.settle()
            if step == 3:
                leave(disk, free_bytes=0)
            if step == 7:
                shutil.rmtree(disk / "filler")
            log.info("step %d of the log, %s", step, "and more " * 200)
            values = {"loss": float(step), **{f"IoU.{name}": 0.5 for name in range(150)}}
            record(loggers, step, values)
            trackers.record(step, values)
    start_logging(None, level="INFO", is_main=True)
    assert [json.loads(line)["loss"] for line in (disk / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 10)
    )
    lines = (disk / "train.log").read_text().splitlines()
    assert [
        step for line in lines for step in range(1, 10) if f" step {step} of the log, and more " in line
    ] == list(range(1, 10))
    assert sum("lines wait in memory" in line for line in lines) == 2  # once for each file
    waits = [line for line in lines if "a record of step" in line and "not written yet" in line]
    assert len(waits) == 4  # TensorBoard, of steps 3 to 6
    events = EventAccumulator(str(disk / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == {
        step: float(step) for step in range(1, 10)
    }


def test_a_full_disk_at_the_start_or_at_a_resume_is_one_sentence(small_disk, launch, ade20k):
    disk = small_disk(size="16m")
    options = [*SMALL, *data_options(ade20k), "runner.max_iters=1", "checkpoint_config.interval=1"]
    command = (
        "launch/train.py",
        TINY,
        "--work-dir",
        disk / "run",
        "--no-validate",
        "--cfg-options",
        *options,
    )

    def refused(*more: str) -> bool:
        done = launch(*command[:4], *more, *command[4:], check=False)
        said = [line for line in done.stderr.splitlines() if "error: " in line]
        return (
            done.returncode == 2
            and len(said) == 1
            and " cannot be written" in said[0]
            and "make room" in said[0]
        )

    leave(disk, free_bytes=0)
    assert refused()
    shutil.rmtree(disk / "filler")
    leave(disk, free_inodes=1)
    assert refused()
    shutil.rmtree(disk / "filler")
    launch(*command)
    leave(disk, free_bytes=4096)
    assert refused("--resume", "auto")


@PIPELINES.register_module()
class FillDiskInStep:
    """An image early in a training fills its disk; a later one makes room again, unless it is `for_good`."""

    def __init__(self, disk: str, for_good: bool) -> None:
        self.disk, self.for_good, self.images = Path(disk), for_good, 0

    def __call__(self, results: dict) -> dict:
        self.images += 1
        if self.images == 9:
            leave(self.disk, free_bytes=0)
        elif self.images == 17 and not self.for_good:
            shutil.rmtree(self.disk / "filler")
        return results


@pytest.mark.parametrize("for_good", [False, True])
def test_a_training_goes_on_while_its_disk_is_full(for_good, small_disk, ade20k):
    disk = small_disk(size="16m")
    cfg = small_experiment(
        ade20k,
        "runner.max_iters=6",
        "checkpoint_config.interval=2",
        "checkpoint_config.max_keep_ckpts=1",
        "evaluation.interval=2",
    )
    cfg.data.train.pipeline.insert(-2, dict(type="FillDiskInStep", disk=str(disk), for_good=for_good))
    unsaved = pytest.raises(CheckpointError, match=r"step, 6,.*--resume auto")
    with (
        unsaved if for_good else nullcontext(),
        SegmentorEngine(cfg, ROOT / "ds_configs/zero1_bf16.json", work_dir=disk / "run") as engine,
    ):
        engine.train()
        assert engine.checkpoints.newest == "iter_6"
    if for_good:
        assert engine.state.step == 6
        return
    records = [json.loads(line) for line in (disk / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in records if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in records if "mIoU" in entry] == [2, 4, 6]
    said = (disk / "run/train.log").read_text()
    assert " could not be saved (" in said and ": it needs " in said and "a record of step" in said
    assert {path.name for path in complete_saves(disk / "run/checkpoints")} >= {"iter_6"}
