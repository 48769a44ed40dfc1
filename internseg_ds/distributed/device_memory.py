"""Memory of the device of this process, in bytes: of its accelerator, or without one of its share of the host's. Talks to no other process."""

import os
import re

import psutil
import torch

from internseg_ds.distributed.process_group import World


def processes_here(world: World) -> int:
    """Processes of this host, by what torchrun, deepspeed, mpirun or srun ("8(x2),4": 8 on two hosts, 4 on a third) say; all of them where none does."""
    said = next(
        (
            os.environ[name]
            for name in (
                "LOCAL_WORLD_SIZE",
                "LOCAL_SIZE",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
                "SLURM_STEP_TASKS_PER_NODE",
            )
            if os.environ.get(name)
        ),
        "",
    )
    number = re.match(r"\d+", said)
    return min(int(number[0]), world.size) if number else world.size


def device_memory(world: World) -> int:
    """All that there is."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return psutil.virtual_memory().total // processes_here(world)


def free_memory(device: torch.device, processes: int) -> int:
    """What this process may still take on its device. processes: of this host, which share its memory where there is no accelerator."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available // processes
