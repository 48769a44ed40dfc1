"""Memory of this process's device, in bytes: of its accelerator, or without one its share of the host's. Not
collective."""

import os
import re

import psutil
import torch

from internseg_ds.distributed.process_group import World

LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",  # torchrun, deepspeed
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",  # mpirun
    "SLURM_STEP_TASKS_PER_NODE",  # srun: "8(x2),4" is 8 on two hosts and 4 on a third
)
"""Environment variables that tell how many processes run on this host; the first one that is set counts."""


def processes_here(world: World) -> int:
    """The number of processes on this host, as the launcher reports it; the size of the world where it does
    not (one host)."""
    reported = next((os.environ[name] for name in LOCAL_SIZES if os.environ.get(name)), "")
    number = re.match(r"\d+", reported)
    return min(int(number[0]), world.size) if number else world.size


def device_memory(world: World) -> int:
    """The device's whole memory in bytes."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return psutil.virtual_memory().total // processes_here(world)


def free_memory(device: torch.device, processes: int) -> int:
    """How many bytes this process may still take on its device.

    processes: the number of processes on this host (`processes_here`), which share its memory where there is
    no accelerator.
    """
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available // processes
