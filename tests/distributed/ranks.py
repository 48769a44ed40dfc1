"""Runs a function of a test module on several real gloo ranks: spawn(function, world_size, *args). The first exception of any rank fails the test.

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

TIMEOUT_S = 240
# ranks are forked from a process that has imported everything, which saves each of them some 5 seconds
multiprocessing.get_context("forkserver").set_forkserver_preload(["internseg_ds.engine.segmentor_engine", "deepspeed", "torch._dynamo", "internseg_ds.distributed.extensions"])


def spawn(function: Callable[..., None], world_size: int, *args: object) -> None:
    ranks = mp.start_processes(_rank, (function, world_size, free_port(), args), nprocs=world_size, join=False, start_method="forkserver")
    deadline = time.monotonic() + TIMEOUT_S
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise AssertionError(f"{function.__name__} with {world_size} ranks has not ended after {TIMEOUT_S} s")


def _rank(rank: int, function: Callable[..., None], world_size: int, port: int, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(CUDA_VISIBLE_DEVICES="", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    try:
        function(*args)
        dist.barrier()  # a rank that exits while another still talks to it can abort
        forget_shared_buffer(rank)
    finally:
        dist.destroy_process_group()
