import os

import pytest
import torch

from internseg_ds.distributed.threads import share_of_cores, take_share_of_cores, user_has_chosen
from tests.distributed.ranks import spawn

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
ALL = range(96)


@pytest.mark.parametrize(
    ("own", "others", "threads"),
    [
        (ALL, [], 96),
        (ALL, [ALL] * 7, 12),  # all see all
        # each has cores of its own: srun --cpus-per-task, mpirun
        (range(12), [range(12 * n, 12 * n + 12) for n in range(1, 8)], 12),
        ([0, 1], [[0, 1], [0, 1]], 1),
        (range(4), [range(2)], 3),
    ],
)
def test_each_core_is_shared_by_the_processes_that_may_run_on_it(own, others, threads):
    assert share_of_cores(own, others) == threads


@pytest.mark.parametrize(
    ("env", "chosen"),
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "1", **TORCHRUN}, False),
        ({"OMP_NUM_THREADS": "1"}, True),
        ({"OMP_NUM_THREADS": "3", **TORCHRUN}, True),
    ],
)
def test_a_one_under_torchrun_is_torchruns_own(env, chosen):
    assert user_has_chosen(env) is chosen


def takes_its_share() -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(7)
    take_share_of_cores()
    assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // 2)
    os.environ["OMP_NUM_THREADS"] = "5"
    torch.set_num_threads(5)
    take_share_of_cores()
    assert torch.get_num_threads() == 5


def test_two_ranks_share_the_cores_of_their_host():
    spawn(takes_its_share, 2)
