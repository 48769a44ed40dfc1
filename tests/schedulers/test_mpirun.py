"""OpenMPI's own launcher; several hosts are the same command with --host or --hostfile."""

import os
import sys

import pytest

from tests.conftest import free_port
from tests.schedulers.conftest import STEPS, steps_of
from tests.schedulers.runs import need, started, wait_for

pytestmark = pytest.mark.multinode


@pytest.fixture
def mpirun() -> list[object]:
    need(mpirun="openmpi-bin")
    return [
        "mpirun",
        *["--allow-run-as-root"] * (os.geteuid() == 0),
        "--oversubscribe",
        "-np",
        2,
        "-x",
        "MASTER_ADDR=127.0.0.1",
        "-x",
        f"MASTER_PORT={free_port()}",
        sys.executable,
    ]


def test_two_processes_of_mpirun_train_together(mpirun, training, tmp_path):
    work_dir = tmp_path / "run"
    with started([*mpirun, *training(work_dir)], tmp_path / "log") as run:
        assert run.wait() == 0, run.output
    assert steps_of(work_dir) == list(range(1, STEPS + 1))
    assert len(list((work_dir / "checkpoints" / f"iter_{STEPS}").glob("*optim_states.pt"))) == 2


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(75)", 75), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)]
)
def test_mpirun_passes_the_exit_code_on(ending, code, mpirun, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, time\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n    {ending}\ntime.sleep(60)"
    )
    with started([*mpirun, script], tmp_path / "log") as run:
        assert run.wait(timeout_s=30) == code, run.output


def test_keep_running_has_the_ranks_of_mpirun_save(mpirun, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\nready = Path(sys.argv[2] + "
        "os.environ['OMPI_COMM_WORLD_RANK'])\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (ready.write_text('saved'), time.sleep(1), "
        "os._exit(75)))\nready.touch()\ntime.sleep(60)"
    )
    command = [
        sys.executable,
        "launch/keep_running.py",
        "--",
        *mpirun,
        script,
        "--work-dir",
        tmp_path / "rank",
    ]
    with started(command, tmp_path / "log") as run:
        wait_for(
            lambda: all((tmp_path / f"rank{rank}").exists() for rank in (0, 1)),
            "start",
            output=lambda: run.output,
        )
        run.process.terminate()
        assert run.wait(timeout_s=30) == 75, run.output
    assert all((tmp_path / f"rank{rank}").read_text() == "saved" for rank in (0, 1))
