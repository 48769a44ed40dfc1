"""How many threads this process computes with on the host, where that decides how fast a step is: DeepSpeed's CPU Adam updates billions of parameters there."""

import logging
import os
from collections.abc import Mapping

import torch

log = logging.getLogger(__name__)


def share_of_cores(processes: int, env: Mapping[str, str] = os.environ) -> int | None:
    """Threads for each of `processes` on this host; None where the user has set OMP_NUM_THREADS.

    torchrun sets it to 1 by itself, which is told from a user's choice by the variable that torchrun always sets: a 1 under torchrun counts as torchrun's.
    Without it, each process would start a thread for every core of the host.
    """
    given = env.get("OMP_NUM_THREADS")
    if given is not None and not (given == "1" and "TORCHELASTIC_RUN_ID" in env):
        return None
    return max(1, len(os.sched_getaffinity(0)) // processes)


def take_share_of_cores(processes: int) -> None:
    """Sets the threads of this process, of torch and of DeepSpeed's extensions, which share one OpenMP library, to `share_of_cores`."""
    if (threads := share_of_cores(processes)) is not None:
        torch.set_num_threads(threads)
        log.info("%d thread%s per process for the optimizer on the host (OMP_NUM_THREADS changes it)", threads, "s" * (threads > 1))
