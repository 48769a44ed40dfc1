"""The number of threads of this process on the host, where it decides how fast a step is: DeepSpeed's CPU
Adam updates billions of parameters there."""

import logging
import os
import socket
from collections.abc import Collection, Mapping, Sequence

import torch

from internseg_ds.distributed.process_group import gather_from_ranks

log = logging.getLogger(__name__)


def user_has_chosen(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has set OMP_NUM_THREADS. torchrun sets it to 1 by itself: a 1 beside a variable that
    only torchrun sets counts as torchrun's."""
    given = env.get("OMP_NUM_THREADS")
    return given is not None and not (given == "1" and "TORCHELASTIC_RUN_ID" in env)


def share_of_cores(own: Collection[int], others: Sequence[Collection[int]]) -> int:
    """Threads for a process that may run on the cores `own`, while each other process of its host may run on
    its one of `others`: the sum of its shares of the cores, at least 1.

    Launchers and schedulers may have given each process cores of its own, or all processes all cores.
    """
    return max(1, int(sum(1 / (1 + sum(core in some for some in others)) for core in own) + 1e-9))


def take_share_of_cores() -> None:
    """Sets the number of threads of this process, of torch and of DeepSpeed's extensions, which share one
    OpenMP library, to its share of the host's cores, unless the user has set OMP_NUM_THREADS. Without it,
    each process would start a thread for every core that it may run on. Collective."""
    of_ranks = gather_from_ranks((socket.gethostname(), sorted(os.sched_getaffinity(0))))
    if user_has_chosen():
        return
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    host, own = of_ranks.pop(rank)
    threads = share_of_cores(own, [set(cores) for where, cores in of_ranks if where == host])
    torch.set_num_threads(threads)
    log.info(
        "%s per process for the optimizer on the host (OMP_NUM_THREADS changes it)",
        "1 thread" if threads == 1 else f"{threads} threads",
    )
