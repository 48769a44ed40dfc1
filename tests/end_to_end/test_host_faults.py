"""What a host does to a training, at real trainings: one sentence, and the documented code on every rank."""

import ctypes
import resource
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from internseg_ds.exit_codes import LOST, USER_ERROR
from tests.conftest import TINY, data_options, free_port
from tests.end_to_end.conftest import SMALL
from tests.forks import script, start_ranks
from tests.mounts import CLONE_NEWNS, skip_without_mounts


def options_of(ade20k: Path, work_dir: Path) -> list[str]:
    return [
        TINY,
        "--work-dir",
        str(work_dir),
        "--no-validate",
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        "runner.max_iters=1000",
        "checkpoint_config.interval=0",
        "data.workers_per_gpu=1",
    ]


def test_a_data_worker_that_is_killed_is_one_sentence(ade20k, tmp_path):
    work_dir, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(script, 2, free_port(), "launch/train.py", options_of(ade20k, work_dir), log, log)
    deadline = time.monotonic() + 120
    while not log.exists() or "  eta" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    while len(children := psutil.Process(ranks[1].pid).children()) != 1:  # it may start a program meanwhile
        assert time.monotonic() < deadline, children
        time.sleep(0.05)
    children[0].kill()
    for rank in ranks:
        rank.join(120)
        rank.kill()
        rank.join()
    said = log.read_text()
    assert [rank.exitcode for rank in ranks] == [LOST, LOST], said[-3000:]
    assert (
        "Traceback" not in said
        and f"error: data worker {children[0].pid} of host " in said
        and ("was killed by a signal (Killed)" in said or "ended without a word" in said)  # who sees it first
    ), said[-3000:]


def test_a_rank_that_is_killed_before_its_engine_is_built_is_named(ade20k, tmp_path):
    work_dir, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(script, 2, free_port(), "launch/train.py", options_of(ade20k, work_dir), log, log)
    deadline = time.monotonic() + 120
    while not log.exists() or "seed 0, 2 processes" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    ranks[1].kill()
    ranks[0].join(60)
    ranks[0].kill()
    said = log.read_text()
    assert ranks[0].exitcode == LOST and "rank 1 " in said and "died" in said, said[-3000:]
    assert "Traceback" not in said, said[-3000:]


def with_few_files(args: list[str], log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    script("launch/train.py", args, log, log)


def with_too_few_files_for_workers(args: list[str], log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (56, 56))
    script("launch/train.py", args, log, log)


def with_little_shared_memory(args: list[str], log: Path) -> None:
    assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", "/dev/shm"], check=True)
    script("launch/train.py", args, log, log)


def test_too_little_shared_memory_for_all_ranks_of_a_host_is_one_sentence(ade20k, tmp_path):
    skip_without_mounts()
    log = tmp_path / "log"
    ranks = start_ranks(with_little_shared_memory, 2, free_port(), options_of(ade20k, tmp_path / "run"), log)
    for rank in ranks:
        rank.join(100)
        rank.kill()
        rank.join()
    said = log.read_text()
    assert (
        [rank.exitcode for rank in ranks] == [USER_ERROR] * 2
        and said.count("/dev/shm has 0 MiB free") == 1
        and "Traceback" not in said
    ), said[-3000:]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (with_few_files, "allows a process no more open files; raise `ulimit -n`"),
        (with_too_few_files_for_workers, "allows a process 56 open files, too few for a data worker"),
        (with_little_shared_memory, "/dev/shm of host"),
    ],
)
def test_what_a_host_does_not_give_is_one_sentence(host, words, ade20k, tmp_path):
    if host is with_little_shared_memory:
        skip_without_mounts()
    log = tmp_path / "log"
    (rank,) = start_ranks(
        host,
        1,
        free_port(),
        [*options_of(ade20k, tmp_path / "run"), "engine.global_batch=None", "data.workers_per_gpu=4"],
        log,
    )
    rank.join(100)
    rank.kill()
    rank.join()
    said = log.read_text()
    assert rank.exitcode == USER_ERROR and words in said and "Traceback" not in said, said[-3000:]
