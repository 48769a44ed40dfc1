import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from internseg_ds.distributed.process_group import (
    AnyRankFlags,
    World,
    first_host,
    hold_meeting_port,
    join,
    leave,
    rendezvous,
    world_from_environment,
)
from internseg_ds.distributed.zero_internals import SHARED_BUFFER_BYTES, shared_buffer_file
from internseg_ds.errors import ConfigError, Lost, UserError
from tests.conftest import free_port
from tests.distributed.ranks import spawn
from tests.forks import start_ranks
from tests.mounts import CLONE_NEWNS, skip_without_mounts


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, World(0, 1, 0, "python")),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, World(3, 4, 1, "deepspeed, torchrun")),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, World(5, 8, 1, "srun")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, World(0, 1, 0, "python")),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "2"},
            World(2, 3, 2, "mpirun"),
        ),
        # mpirun in a Slurm job
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "3",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "3",
            },
            World(2, 3, 0, "mpirun"),
        ),
        # python in a script of sbatch
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"}, World(0, 1, 0, "python")),
        # srun in it
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"},
            World(3, 8, 0, "srun"),
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "7", "SLURM_NTASKS": "8"},
            World(0, 2, 0, "deepspeed, torchrun"),
        ),
    ],
)
def test_each_launchers_variables_are_read(env, expected):
    assert world_from_environment(env) == expected


@pytest.mark.parametrize(
    "env",
    [{"RANK": "two", "WORLD_SIZE": "4"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "-1", "WORLD_SIZE": "4"}],
)
def test_variables_that_make_no_sense_are_one_clear_error(env):
    with pytest.raises(ConfigError, match=r"RANK.*unset"):
        world_from_environment(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-007,12],login1", "gpu003"),
        ("node7", "node7"),
        ("a-1,a-2", "a-1"),
        ("rack2-n[9-10]", "rack2-n9"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodes, host):
    assert first_host(nodes) == host


def test_srun_processes_meet_at_the_jobs_first_host_on_the_jobs_port():
    env = {"SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "1234567"}
    found = rendezvous(World(1, 8, 1, "srun"), env)
    assert found == {
        "RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": str(29500 + 567),
    }


def test_mpirun_without_an_address_says_which_variable_to_set():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        rendezvous(World(0, 2, 0, "mpirun"), {})


def test_single_processes_on_one_machine_take_different_ports():
    assert len({rendezvous(World(), {})["MASTER_PORT"] for _ in range(4)}) > 1


def exchange_of_two_ranks() -> None:
    mine = dist.get_rank() == 1
    # the second is told before the first is read
    exchanges = [
        AnyRankFlags(facts, torch.device("cpu")) for facts in ([mine, not mine, False, True], [False, mine])
    ]
    assert [flags.result() for flags in exchanges] == [[True, True, False, True], [False, True]]


def test_a_fact_of_one_rank_is_a_fact_for_all():
    spawn(exchange_of_two_ranks, 2)


def test_a_port_in_use_is_named_with_the_option_that_chooses_another(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"port {port}.*in use.*--master_port N"):
            join(World(0, 2, 0, "deepspeed, torchrun"))


def test_a_port_is_held_from_the_start_and_joined_later():
    port = str(free_port())
    env = {"MASTER_PORT": port}
    held = hold_meeting_port(World(0, 2), "/this", env)
    assert held is not None
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", int(port)))
    # the process's own second store at the port is the same one, as that of torch's rendezvous is
    again = hold_meeting_port(World(0, 2), "/this", env)
    assert again is not None
    held.set("key", "value")
    assert again.get("key") == b"value"
    del held, again
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"port {taken}.*in use.*--master_port N"):
            hold_meeting_port(World(0, 2), "/this", {"MASTER_PORT": taken})
        agents = {
            "MASTER_PORT": taken,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # torchrun has opened it itself
        assert hold_meeting_port(World(0, 2), "/this", agents) is None
        assert hold_meeting_port(World(1, 2), "/this", {"MASTER_PORT": taken}) is None
    with pytest.raises(ConfigError, match="MASTER_PORT='x' of the environment is no port"):
        hold_meeting_port(World(0, 2), "/this", {"MASTER_PORT": "x"})


@pytest.mark.parametrize(
    ("run", "rank", "words"),
    [
        ("/that", 1, "another run meet, that of /this; start with another"),
        ("/this", 1, "as rank 1 of 2, so two"),
    ],
)
def test_a_process_of_another_run_is_told_so_and_leaves_the_first_alone(run, rank, words, monkeypatch):
    port = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    held = hold_meeting_port(World(0, 2), "/this")
    assert held is not None
    held.set("came/1", "the first run's own")
    with pytest.raises(UserError, match=words):
        join(World(rank, 2), timedelta(seconds=10), run=run)
    assert not held.check(["join/0/refusal/1"])


def joins_twice(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    held = hold_meeting_port(World(rank, 2), "run 0")  # stays: whoever joined before may hold the store
    assert (held is None) == bool(rank)
    for time in range(2):
        join(World(rank, 2), timedelta(seconds=60), run=f"run {time}")
        seen = torch.ones(1)
        dist.all_reduce(seen)
        leave()
        (folder / f"{rank}_{time}").write_text(str(seen.item()))


def test_processes_may_join_again_for_another_run(tmp_path):
    for process in start_ranks(joins_twice, 2, free_port(), tmp_path):
        process.join(90)
        process.kill()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0_0", "0_1", "1_0", "1_1"]
    assert all(file.read_text() == "2.0" for file in tmp_path.iterdir())


def meets_a_rank_0_that_ends(folder: Path) -> None:
    if os.environ["RANK"] == "0":
        store = hold_meeting_port(World(0, 2), "")
        assert store is not None
        store.get("join/0/refusal/1")  # the other is there
        os._exit(0)
    try:
        join(World(1, 2))
    except Lost as error:
        (folder / "said").write_text(str(error))


def test_a_rank_that_ends_before_all_have_met_is_one_sentence(tmp_path):
    for process in start_ranks(meets_a_rank_0_that_ends, 2, free_port(), tmp_path):
        process.join(60)
        process.kill()
    said = (tmp_path / "said").read_text()
    assert "rank 1 on host " in said and "at 127.0.0.1:" in said and "\n" not in said, said


def joins_a_rank_that_is_killed(folder: Path) -> None:
    if os.environ["RANK"] == "1":
        # after all have met, before the first collective
        dist.barrier = lambda: os.kill(os.getpid(), signal.SIGKILL)
    try:
        join(World(int(os.environ["RANK"]), 2))
    except Lost as error:
        (folder / "said").write_text(str(error))


def test_a_rank_that_is_killed_while_all_join_is_one_sentence(tmp_path):
    for process in start_ranks(joins_a_rank_that_is_killed, 2, free_port(), tmp_path):
        process.join(60)
        process.kill()
    said = (tmp_path / "said").read_text()
    assert "another process ended" in said and "MiB are free in /dev/shm" in said, said


@contextmanager
def mounts_of_its_own(commands: str) -> Iterator[int]:
    """A process whose mounts are its own, once it has run these shell commands."""
    skip_without_mounts()
    script = f"set -e; {commands}; echo ready; exec sleep 600"
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"ready\n"
            yield holder.pid
        finally:
            holder.kill()


def joins_among_the_mounts_of(pid: int, folder: Path) -> None:
    with open(f"/proc/{pid}/ns/mnt") as mounts:
        assert ctypes.CDLL(None, use_errno=True).setns(mounts.fileno(), CLONE_NEWNS) == 0
    world = world_from_environment()
    try:
        join(world)
    except UserError as error:
        (folder / f"said_{world.rank}").write_text(str(error))
        return
    total = torch.ones(1)
    deepspeed.comm.all_reduce(total)
    leave()
    (folder / f"said_{world.rank}").write_text(f"joined {total.item():.0f}")


@pytest.mark.parametrize(
    ("content", "said"), [("leftover buffers", "joined 2"), ("something else", "/dev/shm has 1 MiB free")]
)
def test_buffers_that_a_killed_run_left_count_as_room(content, said, tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    size = 2 * SHARED_BUFFER_BYTES + 2**20
    names = [shared_buffer_file(rank) for rank in range(2)]
    if content == "something else":
        names = [name.with_name(f"other_{name.name}") for name in names]
    fill = "; ".join(f"head -c {SHARED_BUFFER_BYTES} /dev/zero > {name}" for name in names)
    with mounts_of_its_own(f"mount -t tmpfs -o size={size} tmpfs /dev/shm; {fill}") as holder:
        for rank in start_ranks(joins_among_the_mounts_of, 2, port, holder, tmp_path):
            rank.join(100)
            rank.kill()
    assert all(said in (tmp_path / f"said_{rank}").read_text() for rank in range(2))


def joins_a_rank_without_a_device(folder: Path) -> None:
    world = world_from_environment()
    if world.rank == 1:
        os.environ["INTERNSEG_DEVICE"] = "gpu"
    with pytest.raises(UserError) as refused:
        join(world)
    (folder / f"said_{world.rank}").write_text(str(refused.value))


def test_a_device_that_one_rank_cannot_have_is_said_on_all(tmp_path):
    for process in start_ranks(joins_a_rank_without_a_device, 2, free_port(), tmp_path):
        process.join(50)
        process.kill()
    for rank in range(2):
        assert "INTERNSEG_DEVICE='gpu'" in (tmp_path / f"said_{rank}").read_text()
