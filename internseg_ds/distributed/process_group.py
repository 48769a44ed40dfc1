"""Which process of how many this is, and the process group that they form.

In: the environment variables of whichever launcher started the process (deepspeed and torchrun: RANK ...; srun: SLURM_PROCID ...; mpirun:
OMPI_COMM_WORLD_RANK ...; none: a plain `python` is a group of one). Out: a `World`, and between `join` and `leave` a torch.distributed group
(nccl where there is a GPU, gloo where there is none).
"""

import os
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from internseg_ds.device import VARIABLE, device_type
from internseg_ds.distributed.extensions import build_extension, forget_shared_buffer
from internseg_ds.errors import ConfigError, Lost, UserError, reason_of

# variable names of (rank, world size, local rank); the first complete set wins. mpirun stands before srun: in a Slurm job it sets its own and inherits Slurm's
LAUNCHERS = {
    "deepspeed, torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
DEFAULT_PORT = 29500
PEER_GONE = re.compile("Connection (?:reset|closed) by (?:peer|remote peer)|Broken pipe")
"""How gloo says that a process it was connected with has ended."""
REFUSAL = timedelta(seconds=60)
"""How long a process that cannot run waits for the others, to tell them."""


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` over all hosts, `local_rank` on this one, and the device that is its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none, or `INTERNSEG_DEVICE=cpu`. Raises ConfigError when the host has more processes than GPUs,
        and where `device_type` does."""
        if device_type() == "cpu":
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if count == 1 and self.launcher == "srun":
            return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each process its own GPU alone
        if self.local_rank >= count:
            raise ConfigError(
                f"process {self.local_rank} of this host has no GPU of its own, {count} can be seen; start at most {count} processes per host"
            )
        return torch.device("cuda", self.local_rank)


def world_from_environment(env: Mapping[str, str] = os.environ) -> World:
    """Reads the launcher's variables; takes no device and opens no connection.

    Raises ConfigError when the variables are there but are not numbers, or name a rank outside the world.
    """
    for launcher, (rank, size, local_rank) in LAUNCHERS.items():
        if launcher == "srun" and env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env:
            continue  # the script that sbatch runs: it has the job's variables, but srun did not start it
        if rank in env and size in env:
            try:
                world = World(int(env[rank]), int(env[size]), int(env.get(local_rank, 0)), launcher)
            except ValueError:
                raise ConfigError(
                    f"{rank}={env[rank]!r} and {size}={env[size]!r} of the environment are not whole numbers; "
                    f"start with deepspeed, torchrun, srun or mpirun, or unset them to run in one process"
                ) from None
            if not 0 <= world.rank < world.size:
                raise ConfigError(
                    f"{rank}={world.rank} is not below {size}={world.size}; unset both to run in one process"
                )
            if launcher == "srun" and world.size == 1:
                continue  # an interactive Slurm shell sets SLURM_PROCID=0 for everything that runs in it
            return world
    return World()


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: "gpu[003-007,12],login1" -> "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", node_list)
    if match is None:
        raise ConfigError(
            f"SLURM_JOB_NODELIST={node_list!r} names no host; set MASTER_ADDR to the host of rank 0"
        )
    return match[1] + (match[2] or "")


def rendezvous(world: World, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The five variables that torch.distributed and DeepSpeed read (`env://`), for launchers that do not set them themselves.

    LOCAL_RANK is the number of this process's GPU, which DeepSpeed takes it for: 0 where srun shows each process its own GPU alone.
    """
    if "MASTER_ADDR" in env:
        address = env["MASTER_ADDR"]
    elif world.launcher == "srun":
        address = first_host(env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST", "")))
    elif world.size == 1:
        address = "127.0.0.1"
    else:
        raise ConfigError(
            f"{world.launcher} started {world.size} processes but MASTER_ADDR is not set; set it to the host of rank 0 "
            f"(mpirun: -x MASTER_ADDR=host)"
        )
    if "MASTER_PORT" in env:
        port = env["MASTER_PORT"]
    elif world.size == 1:
        with socket.socket() as probe:  # several single-process runs may share a machine
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
    else:
        port = str(DEFAULT_PORT + int(env.get("SLURM_JOB_ID", 0)) % 1000)
    device = world.local_rank
    with suppress(ConfigError):  # a process without a GPU of its own still has to tell the others
        device = (
            world.device.index if world.device.type == "cuda" else device
        )  # DeepSpeed takes the GPU of the number LOCAL_RANK
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(device),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def join(
    world: World, timeout: timedelta = timedelta(minutes=30), *, refusal: UserError | None = None
) -> None:
    """Makes the process group and takes this process's device.

    refusal: what this process cannot run with. Raises it, and in its words a UserError on all other processes, before any device is taken: a host that lacks
    the data shall not leave the others waiting.
    """
    os.environ.update(rendezvous(world))
    store = _meet(world, timeout, refusal)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        build_extension("ShareMemCommBuilder")  # DeepSpeed's own collectives on one host
    try:
        adopt(timeout)
        del store  # until now: rank 0 serves the group's own store at the same port
        if world.device.type == "cpu":
            dist.barrier()
            forget_shared_buffer(world.rank)
    except RuntimeError as error:
        if PEER_GONE.search(str(error)) is None:
            raise
        free = shutil.disk_usage("/dev/shm").free / 2**20
        raise Lost(
            f"another process ended while all met, as rank {world.rank} on host {socket.gethostname()} sees it ({reason_of(error)[:200]}); what it said "
            f"is the reason, or where a signal killed it, want of memory: {free:.0f} MiB are free in /dev/shm here, and DeepSpeed's collectives on CPUs "
            "take 66 for each process"
        ) from error


def adopt(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Has DeepSpeed use the process group that there is, or make one. Raises ConfigError where it was imported before `INTERNSEG_DEVICE=cpu` was known."""
    import deepspeed  # here: half a dozen seconds, and readers of the environment need none of it
    from deepspeed.accelerator import get_accelerator

    if device_type() == "cpu" and (chosen := get_accelerator().device_name()) != "cpu":
        raise ConfigError(
            f"{VARIABLE}=cpu, but deepspeed was imported before internseg_ds and has chosen {chosen}; set DS_ACCELERATOR=cpu too"
        )
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def _meet(world: World, timeout: timedelta, refusal: UserError | None) -> dist.Store:
    """The store that all processes share, once each has said that it can run. Raises UserError on all when one cannot."""
    if refusal is not None and world.size == 1:
        raise refusal
    try:
        store, *_ = next(
            dist.rendezvous("env://", world.rank, world.size, timeout=timeout if refusal is None else REFUSAL)
        )
        store.set(
            f"refusal/{world.rank}",
            f"{refusal} (on host {socket.gethostname()})" if refusal is not None else "",
        )
        if world.is_main:
            store.set(
                "refusal",
                next(filter(None, (store.get(f"refusal/{rank}").decode() for rank in range(world.size))), ""),
            )
        found = store.get("refusal").decode()
        read = store.add("read", 1)
        while found and world.is_main and read < world.size:  # the store goes with this process
            time.sleep(0.05)
            read = store.add("read", 0)
    except dist.DistError as error:
        if refusal is None and world.is_main and "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {os.environ['MASTER_PORT']} of this host, where the processes are to meet, is in use, by another run perhaps; start with "
                "another: --master_port N of deepspeed, --master-port N of torchrun, or MASTER_PORT=N in the environment"
            ) from error
        if refusal is None:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise Lost(
                f"rank {world.rank} on host {socket.gethostname()} has not met the others at {place}, or one went away "
                f"({reason_of(error)[:300]}); what the others said first is the reason"
            ) from error
        raise refusal from None  # the others have not come: what is wrong here is still wrong
    if found:
        raise refusal or UserError(found)
    return store


def of_all_ranks(value: Any) -> list[Any]:
    """`value` of every rank, in their order; of this one alone where there is no group. Collective."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class Vote:
    """Facts that all ranks hear of each other: `Vote(...)` tells them, without waiting for a GPU, and `result` waits for what was told, no longer than for
    what the GPU was given before. Collective, both."""

    def __init__(self, facts: Sequence[bool], device: torch.device) -> None:
        told = torch.cat(
            [torch.full((1,), int(fact), dtype=torch.int32, device=device) for fact in facts]
        )  # filled there: a copy would wait for the GPU
        dist.all_reduce(told, dist.ReduceOp.MAX)
        self._told, self._event = (
            told.to("cpu", non_blocking=True),
            torch.cuda.Event() if device.type == "cuda" else None,
        )
        if self._event is not None:
            self._event.record()

    def result(self) -> list[bool]:
        """Of each fact: whether it holds on some rank."""
        if self._event is not None:
            self._event.synchronize()
        return [bool(fact) for fact in self._told.tolist()]


def any_rank(facts: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each fact: whether it holds on some rank. Collective."""
    return Vote(facts, device).result()


def leave() -> None:
    """Ends the process group, if there is one. A rank that just exits can abort while another still talks to it, so every path ends here."""
    if dist.is_initialized():
        from deepspeed import (
            comm,
        )  # forgets the groups that it has made of this one, too, which the next engine of this process would find

        comm.destroy_process_group()
