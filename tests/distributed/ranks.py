"""Runs a function of a test module on several real gloo ranks: spawn(function, world_size, *args). The first
exception of any rank fails the test.

Ranks that wait for each other for ever are killed, and fail it too."""

import multiprocessing
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from internseg_ds.distributed.extensions import forget_shared_buffer
from tests.conftest import free_port
from tests.forks import environment_of, ready

TIMEOUT_S = 240


def spawn(function: Callable[..., None], world_size: int, *args: object) -> None:
    ready()
    ranks = mp.start_processes(
        _rank,
        (function, world_size, free_port(), args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise AssertionError(
                f"{function.__name__} with {world_size} ranks has not ended after {TIMEOUT_S} s"
            )


def _rank(rank: int, function: Callable[..., None], world_size: int, port: int, args: tuple) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in any training
    os.environ.update(environment_of(rank, world_size, port))
    dist.init_process_group("gloo")
    try:
        function(*args)
        dist.barrier()  # a rank that exits while another still talks to it can abort
        forget_shared_buffer(rank)
    finally:
        dist.destroy_process_group()
