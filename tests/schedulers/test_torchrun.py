import sys

import pytest

from tests.conftest import free_port
from tests.schedulers.conftest import STEPS, steps_of
from tests.schedulers.runs import started, wait_for

FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it ranks that come back may find the addresses of those before them in torch's store, and fail or
hang (pytorch issue 135712, seen with 2.13)."""


def agent(port: int, *options: object) -> list[object]:
    """torchrun on one of two nodes, with one process."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        2,
        "--nproc-per-node",
        1,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
        "--local-addr",
        "localhost",
        *options,
    ]


@pytest.mark.multinode
def test_two_agents_train_together(training, tmp_path):
    port, work_dir = free_port(), tmp_path / "run"
    command = [*agent(port), *training(work_dir), "runner.max_iters=2", "checkpoint_config.interval=2"]
    with started(command, tmp_path / "a") as one, started(command, tmp_path / "b") as other:
        assert (one.wait(), other.wait()) == (0, 0), one.output + other.output
    assert steps_of(work_dir) == [1, 2]
    assert len(list((work_dir / "checkpoints" / "iter_2").glob("*optim_states.pt"))) == 2


@pytest.mark.multinode
def test_a_killed_rank_comes_back_on_all_nodes_with_max_restarts(training, tmp_path):
    port, work_dir = free_port(), tmp_path / "run"
    command = [*agent(port, "--max-restarts", 2), *training(work_dir, "--resume", "auto")]
    with (
        started(command, tmp_path / "a", env=FRESH_STORE) as one,
        started(command, tmp_path / "b", env=FRESH_STORE) as other,
    ):
        wait_for(
            (work_dir / "checkpoints" / "latest").exists,
            "checkpoint",
            output=lambda: one.output + other.output,
        )
        (killed,) = other.ranks().values()
        killed.kill()
        assert (one.wait(), other.wait()) == (0, 0), one.output + other.output
    assert steps_of(work_dir) == list(range(1, STEPS + 1))


@pytest.mark.multinode
@pytest.mark.parametrize("code", [2, 75])
def test_torchrun_hides_the_exit_code_of_its_processes(code, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"raise SystemExit({code})")
    with started(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, script],
        tmp_path / "log",
    ) as run:
        assert run.wait() == 1 and f"exitcode  : {code}" in run.output
