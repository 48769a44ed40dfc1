"""Runs a function of a test module on several real gloo ranks: spawn(function, world_size, *args). The first exception of any rank fails the test."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.conftest import free_port


def spawn(function: Callable[..., None], world_size: int, *args: object) -> None:
    mp.spawn(_rank, (function, world_size, free_port(), args), nprocs=world_size)


def _rank(rank: int, function: Callable[..., None], world_size: int, port: int, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(CUDA_VISIBLE_DEVICES="", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    try:
        function(*args)
        dist.barrier()  # a rank that exits while another still talks to it can abort
    finally:
        dist.destroy_process_group()
