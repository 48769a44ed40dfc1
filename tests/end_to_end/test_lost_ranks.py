"""Ranks that die or hang: the others end, say which one it was and where it stood, and nothing of the run
stays on the machine."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from internseg_ds.exit_codes import LOST
from internseg_ds.training.launcher import is_launcher
from tests.conftest import ROOT, TINY, data_options, free_port
from tests.end_to_end.conftest import SMALL

ENDLESS = ["runner.max_iters=100000", "checkpoint_config.interval=0"]


def processes_of(work_dir: Path) -> list[psutil.Process]:
    """Launcher, ranks and their data workers, which all have the work directory in their command line;
    zombies are left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(work_dir) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


@contextmanager
def running(
    work_dir: Path, ade20k: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen, dict[int, psutil.Process]]]:
    """(the launcher of 2 ranks that train for ever, the ranks); they have begun."""
    command = [
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "launch/train.py",
        TINY,
        "--work-dir",
        work_dir,
        "--no-validate",
        *arguments,
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        *ENDLESS,
    ]
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    launcher = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (work_dir / "metrics.jsonl").exists() or not (work_dir / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.1)
        ranks = {}
        for process in processes_of(work_dir):
            if (
                process.parent().cmdline()[-1:] == process.cmdline()[-1:]
                and "deepspeed.launcher.launch" in process.parent().cmdline()
            ):
                ranks[int(process.environ()["RANK"])] = process
        assert sorted(ranks) == [0, 1]
        yield launcher, ranks
    finally:
        for process in processes_of(work_dir):
            process.kill()
        launcher.wait()


def nothing_stays(work_dir: Path, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not processes_of(work_dir):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_others_within_seconds(victim, ade20k, tmp_path):
    with running(tmp_path, ade20k, "--heartbeat-timeout", "600") as (launcher, ranks):
        pid = ranks[victim].pid
        ranks[victim].kill()
        output, _ = launcher.communicate(timeout=20)
        assert launcher.returncode != 0
        assert nothing_stays(tmp_path, within_s=10)
    died = rf"rank {victim} \(host \S+, process {pid}\) at step \d+, \w+ died\..*--resume auto"
    assert re.search(died, output), output[-3000:]


@pytest.mark.slow
def test_a_rank_that_is_frozen_ends_the_others_after_the_heartbeat_timeout(ade20k, tmp_path):
    with running(tmp_path, ade20k, "--heartbeat-timeout", "4") as (launcher, ranks):
        ranks[1].suspend()
        frozen = time.monotonic()
        ranks[0].wait(timeout=15)
        assert time.monotonic() - frozen > 3
        assert re.search(r"rank 1 .*no sign of life for 4 s", (tmp_path / "train.log").read_text())
        ranks[1].resume()  # lest the launcher wait 30 s for it
        assert launcher.wait(timeout=60) == LOST and nothing_stays(tmp_path, within_s=10)


def test_a_training_whose_launcher_was_terminated_saves_and_ends(ade20k, tmp_path):
    """deepspeed's runner dies of SIGTERM alone, and its launch.py with the ranks would go on for ever."""
    with running(tmp_path, ade20k) as (launcher, _):
        launcher.terminate()
        launcher.wait(10)
        assert nothing_stays(tmp_path, within_s=60)
    said = (tmp_path / "train.log").read_text()
    tag = (tmp_path / "checkpoints/latest").read_text()
    assert "launcher of this training" in said and f"--resume auto goes on from {tag}" in said


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python3.11 /venv/bin/deepspeed --num_gpus 2 launch/train.py", True),
        ("/usr/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=e30=", True),
        ("python /venv/bin/torchrun --standalone", True),
        ("python -m torch.distributed.run --nproc_per_node 2", True),
        ("mpirun -np 2 python", True),
        ("bash -c deepspeed", False),
        ("-bash", False),
        ("python launch/keep_running.py -- deepspeed", False),
        ("sh ./deepspeed_job.sh", False),
    ],
)
def test_launchers_are_known_by_their_command_lines(command, expected):
    assert (
        is_launcher(command.split(" ", 2) if command.startswith("bash -c") else command.split(" "))
        is expected
    )
    assert is_launcher(["slurmstepd: [4711.0]"])


@pytest.mark.slow
def test_a_rank_that_is_frozen_for_less_goes_on(ade20k, tmp_path):
    with running(tmp_path, ade20k, "--heartbeat-timeout", "30") as (launcher, ranks):
        ranks[1].suspend()
        time.sleep(3)
        ranks[1].resume()
        before = (tmp_path / "metrics.jsonl").read_text().count("\n")
        deadline = time.monotonic() + 60
        while (tmp_path / "metrics.jsonl").read_text().count("\n") < before + 3:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.1)


def test_a_rank_that_hangs_is_named_with_its_line(launch, ade20k, tmp_path):
    """One of its label maps is a pipe that nobody writes to."""
    root, work_dir = tmp_path / "ade", tmp_path / "run"
    shutil.copytree(ade20k, root)
    labels = sorted((root / "annotations" / "training").iterdir())[9]
    labels.unlink()
    os.mkfifo(labels)
    done = launch(
        "launch/train.py",
        TINY,
        "--work-dir",
        work_dir,
        "--no-validate",
        "--heartbeat-timeout",
        "4",
        "--cfg-options",
        *SMALL,
        *data_options(root),
        *ENDLESS,
        "data.workers_per_gpu=0",
        launcher="deepspeed",
        check=False,
    )
    assert done.returncode == LOST and nothing_stays(work_dir, within_s=10)
    found = re.search(
        r"no rank has got on for 4 s: the other 1 wait for rank (\d) .* at step (\d+), data \((\S+)",
        done.stderr,
    )
    assert found and "file_client" in found[3], done.stderr[-3000:]
    assert "most recent call first" in done.stderr  # the stack of the one that hangs


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
def test_a_save_that_hangs_ends_after_its_limit(processes, launch, ade20k, tmp_path):
    """The pointer to it is written through a pipe that nobody reads: a disk that does not answer."""
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "checkpoints/latest.new")
    done = launch(
        "launch/train.py",
        TINY,
        "--work-dir",
        tmp_path,
        "--no-validate",
        "--heartbeat-timeout",
        "4",
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        "runner.max_iters=1",
        "checkpoint_config.interval=1",
        "engine.io_timeout=20",
        processes=processes,
        check=False,
    )
    assert done.returncode == LOST and nothing_stays(tmp_path, within_s=10)
    hangs = r" for 20 s: .* rank 0 \(host .*\) at step 1, saving \(\S+"
    assert re.search(hangs, done.stderr), done.stderr[-3000:]
    assert "in publish" in done.stderr  # of the stack
