"""How many threads this process computes with on the host, where that decides how fast a step is: DeepSpeed's CPU Adam updates billions of parameters there."""

import logging
import os
import socket
from collections.abc import Collection, Mapping, Sequence

import torch

from internseg_ds.distributed.process_group import of_all_ranks

log = logging.getLogger(__name__)


def user_has_chosen(env: Mapping[str, str] = os.environ) -> bool:
    """Whether OMP_NUM_THREADS is the user's. torchrun sets it to 1 by itself, which is told by the variable that torchrun always sets: a 1 beside it
    counts as torchrun's."""
    given = env.get("OMP_NUM_THREADS")
    return given is not None and not (given == "1" and "TORCHELASTIC_RUN_ID" in env)


def share_of_cores(own: Collection[int], others: Sequence[Collection[int]]) -> int:
    """Threads for a process that may run on the cores `own`, beside other processes of its host that may run on theirs: of each core its part, 1 at least.

    Launchers and schedulers may have given each process cores of its own, or let all see all.
    """
    return max(1, int(sum(1 / (1 + sum(core in some for some in others)) for core in own) + 1e-9))


def take_share_of_cores() -> None:
    """Sets the threads of this process, of torch and of DeepSpeed's extensions, which share one OpenMP library, to its share of the host's cores, unless
    OMP_NUM_THREADS says otherwise. Without it, each process would start a thread for every core that it sees. Collective."""
    told = of_all_ranks((socket.gethostname(), sorted(os.sched_getaffinity(0))))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    host, own = told[rank]
    if user_has_chosen():
        return
    threads = share_of_cores(
        own, [set(cores) for index, (where, cores) in enumerate(told) if where == host and index != rank]
    )
    torch.set_num_threads(threads)
    log.info(
        "%d thread%s per process for the optimizer on the host (OMP_NUM_THREADS changes it)",
        threads,
        "s" * (threads > 1),
    )
