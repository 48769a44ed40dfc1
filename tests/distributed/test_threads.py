import os

import pytest

from internseg_ds.distributed.threads import share_of_cores

CORES = len(os.sched_getaffinity(0))
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(("env", "processes", "threads"), [
    ({}, 1, CORES),
    ({}, CORES, 1),
    ({}, 3 * CORES, 1),
    ({"OMP_NUM_THREADS": "1", **TORCHRUN}, 1, CORES),  # torchrun's own
    ({"OMP_NUM_THREADS": "1"}, 1, None),
    ({"OMP_NUM_THREADS": "3", **TORCHRUN}, 1, None),
])
def test_each_process_gets_its_share_of_the_cores_unless_the_user_said_otherwise(env, processes, threads):
    assert share_of_cores(processes, env) == threads
