"""The watch alone: real ranks that die, fail, leave and are asked to stop, without a training around them."""

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.distributed.process_group import world_from_environment
from internseg_ds.distributed.watchdog import GRACE_S, Watchdog, joined, time_limit
from internseg_ds.errors import ConfigError, DataError, Lost
from internseg_ds.exit_codes import FAILED, LOST
from internseg_ds.host_faults import explained
from tests.conftest import free_port
from tests.forks import start_ranks


def ranks(function: Callable[[int], None], count: int, folder: Path) -> tuple[list[int], str]:
    """Exit codes of `count` ranks that ran `function` under a watch, and what they logged."""
    processes = start_ranks(_rank, count, free_port(), function, folder)
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes], "".join(
        (folder / f"{rank}.log").read_text() for rank in range(count)
    )


def _rank(function: Callable[[int], None], folder: Path) -> None:
    world = world_from_environment()
    logging.getLogger("internseg_ds").addHandler(logging.FileHandler(folder / f"{world.rank}.log"))
    with joined(world):
        function(world.rank)


def waits_while_rank_2_is_killed(rank: int) -> None:
    if rank == 2:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_all_ranks_end_when_one_is_killed(tmp_path):
    began = time.monotonic()
    codes, log = ranks(waits_while_rank_2_is_killed, 3, tmp_path)
    assert (
        codes == [LOST, LOST, -signal.SIGKILL]
        and log.count("rank 2 (host ") == 1
        and " died. This run ends" in log
    )
    assert time.monotonic() - began < 50


def waits_while_rank_0_is_killed(rank: int) -> None:
    if rank == 0:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_all_ranks_end_when_rank_0_is_killed(tmp_path):
    codes, log = ranks(waits_while_rank_0_is_killed, 3, tmp_path)
    assert codes == [-signal.SIGKILL, LOST, LOST] and "rank 0 (host " in log


def fails_on_rank_1_alone(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("of rank 1")
    dist.barrier()


def test_the_error_of_one_rank_is_told_to_the_others(tmp_path):
    codes, log = ranks(fails_on_rank_1_alone, 2, tmp_path)
    assert codes == [FAILED, FAILED] and "ended with ZeroDivisionError: of rank 1" in log


def test_a_data_worker_that_was_killed_is_a_loss_wherever_torch_raises_it():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    meant = explained(killed)
    assert isinstance(meant, Lost) and "data worker 7 of host" in str(meant)
    assert explained(other := RuntimeError("of something else")) is other


def fails_on_all_ranks(rank: int) -> None:
    time.sleep(0.3 * rank)
    raise DataError("known to all")


def test_an_error_of_all_ranks_is_no_loss(tmp_path):
    codes, log = ranks(fails_on_all_ranks, 2, tmp_path)
    assert codes == [1, 1] and log == ""


def leaves_one_after_the_other(rank: int) -> None:
    time.sleep(rank)


def test_ranks_that_are_done_at_different_times_are_no_loss(tmp_path):
    assert ranks(leaves_one_after_the_other, 3, tmp_path) == ([0, 0, 0], "")


def one_is_asked_and_all_hear(rank: int) -> None:
    watch = Watchdog(world_from_environment(), hang_s=0)
    if rank == 1:
        watch.ask_to_stop()
    deadline = time.monotonic() + 5 * GRACE_S
    while not watch.asked_to_stop:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)  # whoever leaves at once might take the news along
    watch.close()


def test_a_request_to_stop_reaches_every_rank(tmp_path):
    assert ranks(one_is_asked_and_all_hear, 3, tmp_path) == ([0, 0, 0], "")


def stands_still_on_rank_1(rank: int) -> None:
    watch = Watchdog(world_from_environment(), hang_s=3)
    for step in range(1, 20):
        watch.at(step, "data")
        if rank == 1 and step == 10:
            time.sleep(60)
        watch.at(step, "forward")
        time.sleep(0.1)
        watch.at(step, "agreeing")
        dist.barrier()
    watch.close()


def test_a_rank_that_stands_still_is_told_from_those_that_wait_for_it(tmp_path):
    codes, log = ranks(stands_still_on_rank_1, 3, tmp_path)
    assert codes == [LOST, LOST, LOST]
    assert (
        re.search(r" for 3 s: the other 2 wait for rank 1 \(host ", log)
        and "at step 10, data (" in log
        and "stands_still_on_rank_1" in log
    )


def saves_longer_than_the_limit(rank: int) -> None:
    watch = Watchdog(world_from_environment(), hang_s=3)
    watch.at(1, "data")
    watch.at(1, "saving")
    time.sleep(6)
    dist.barrier()
    watch.at(2, "data")
    watch.close()


def test_a_slow_save_is_no_hang(tmp_path):
    assert ranks(saves_longer_than_the_limit, 2, tmp_path) == ([0, 0], "")


def hangs_in_a_save_on_rank_1(rank: int) -> None:
    watch = Watchdog(world_from_environment(), hang_s=3, io_s=6)
    watch.at(1, "data")
    with watch.during(1, "saving"):
        time.sleep(4)  # slow alone
    dist.barrier()
    with watch.during(2, "saving"):
        if rank == 1:
            time.sleep(60)
        dist.barrier()


def test_a_save_that_hangs_ends_all_ranks_after_a_limit_of_its_own(tmp_path):
    began = time.monotonic()
    codes, log = ranks(hangs_in_a_save_on_rank_1, 2, tmp_path)
    assert codes == [LOST, LOST] and time.monotonic() - began < 50
    assert (
        re.search(r" for 6 s: the other 1 wait for rank 1 \(host ", log)
        and "at step 2, saving (" in log
        and "hangs_in_a_save_on_rank_1" in log
    )


def hangs_alone(rank: int) -> None:
    watch = Watchdog(world_from_environment(), hang_s=3, io_s=4)
    watch.at(1, "data")
    time.sleep(5)  # in a debugger
    watch.at(1, "idle")
    time.sleep(5)  # in a notebook
    watch.at(2, "saving")
    time.sleep(60)


@pytest.mark.slow
def test_one_process_alone_is_timed_while_it_saves(tmp_path):
    codes, log = ranks(hangs_alone, 1, tmp_path)
    assert codes == [LOST] and " for 4 s" in log and "at step 2, saving (" in log


def leaves_alone(rank: int) -> None:
    watch = Watchdog(world_from_environment(), hang_s=3, io_s=4)
    watch.at(1, "saving")
    watch.close(ZeroDivisionError() if os.environ.get("FAILS") else None)
    time.sleep(6)


@pytest.mark.slow
def test_nothing_is_timed_after_the_end(tmp_path):
    assert ranks(leaves_alone, 1, tmp_path) == ([0], "")
    began = time.monotonic()
    os.environ["FAILS"] = "yes"
    assert ranks(leaves_alone, 1, tmp_path) == ([0], "") and time.monotonic() - began < 30


def looks_at_a_disk_that_does_not_answer(rank: int) -> None:
    with time_limit(30, "a quick look"):
        pass
    with time_limit(1, "looking at the weights"):
        time.sleep(60)


def test_what_comes_before_the_watch_is_timed_too(tmp_path):
    codes, log = ranks(looks_at_a_disk_that_does_not_answer, 1, tmp_path)
    assert codes == [LOST] and "took more than 1 s (engine.io_timeout)" in log


@pytest.mark.parametrize("limit", [-1, 5, True, "1h", float("inf"), float("nan")])
def test_a_limit_that_healthy_disks_would_exceed_or_that_is_no_time_is_refused(limit):
    with pytest.raises(ConfigError, match=r"engine\.io_timeout=.*10 seconds, or 0"):
        EngineOptions(io_timeout=limit)
    assert EngineOptions(io_timeout=0).io_timeout == 0
