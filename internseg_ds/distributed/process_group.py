"""The rank of this process, and the process group.

In: the environment variables of the launcher that started the process (deepspeed and torchrun: RANK ...;
srun: SLURM_PROCID ...; mpirun: OMPI_COMM_WORLD_RANK ...; none: a plain `python` is a group of one). Out: a
`World`, and between `join` and `leave` a torch.distributed group (nccl where there is a GPU, gloo where there
is none).
"""

import json
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
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as make_stores

from internseg_ds.device import VARIABLE, device_type
from internseg_ds.distributed.extensions import build_extension, forget_shared_buffer, prints_logged
from internseg_ds.distributed.zero_internals import SHARED_BUFFER_BYTES, shared_buffer_file
from internseg_ds.errors import ConfigError, HostError, Lost, UserError, counted, reason_of
from internseg_ds.host_faults import MORE_SHARED_MEMORY

# variable names of (rank, world size, local rank); the first complete set counts. mpirun comes before srun:
# in a Slurm job it sets its own and inherits Slurm's
LAUNCHERS = {
    "deepspeed, torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
DEFAULT_PORT = 29500
ANOTHER_PORT = (
    "start with another: --master_port N of deepspeed, --master-port N of torchrun, or MASTER_PORT=N in the "
    "environment"
)
PEER_GONE = re.compile("Connection (?:reset|closed) by (?:peer|remote peer)|Broken pipe")
"""Parts of gloo's error messages when a process that it was connected with has ended."""
REFUSAL = timedelta(seconds=60)
"""How long a process that cannot run waits for the others to connect, in order to report to them."""


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size` over all hosts, `local_rank` on this host, and its own
    device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's GPU; the CPU where there is no GPU, or `INTERNSEG_DEVICE=cpu`. Raises ConfigError
        when the host has more processes than GPUs, and where `device_type` does."""
        if device_type() == "cpu":
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if count == 1 and self.launcher == "srun":
            return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each process its own GPU alone
        if self.local_rank >= count:
            raise ConfigError(
                f"process {self.local_rank} of this host has no GPU of its own, {count} can be seen; start "
                f"at most {counted(count, 'process')} per host"
            )
        return torch.device("cuda", self.local_rank)


def world_from_environment(env: Mapping[str, str] = os.environ) -> World:
    """Reads the launcher's variables; takes no device and opens no connection.

    Raises ConfigError when the variables are not numbers, or name a rank outside the world.
    """
    for launcher, (rank, size, local_rank) in LAUNCHERS.items():
        if rank not in env or size not in env or (launcher == "srun" and _is_batch_script(env)):
            continue
        try:
            world = World(int(env[rank]), int(env[size]), int(env.get(local_rank, 0)), launcher)
        except ValueError:
            raise ConfigError(
                f"{rank}={env[rank]!r} and {size}={env[size]!r} of the environment are not whole numbers; "
                "start with deepspeed, torchrun, srun or mpirun, or unset them to run in one process"
            ) from None
        if not 0 <= world.rank < world.size:
            raise ConfigError(
                f"{rank}={world.rank} is not below {size}={world.size}; unset both to run in one process"
            )
        # an interactive Slurm shell sets SLURM_PROCID=0 for everything that runs in it
        if launcher != "srun" or world.size > 1:
            return world
    return World()


def _is_batch_script(env: Mapping[str, str]) -> bool:
    """Whether this is the script that sbatch runs: it has the job's variables, but srun did not start it."""
    return env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: "gpu[003-007,12],login1" -> "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", node_list)
    if match is None:
        raise ConfigError(
            f"SLURM_JOB_NODELIST={node_list!r} names no host; set MASTER_ADDR to the host of rank 0"
        )
    return match[1] + (match[2] or "")


def rendezvous(world: World, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The five variables that torch.distributed and DeepSpeed read (`env://`), for launchers that do not set
    them.

    LOCAL_RANK is the index of this process's GPU, since DeepSpeed takes the GPU of that index: 0 where srun
    shows each process only its own GPU. Raises ConfigError where no variable gives the address of rank 0.
    """
    device = world.local_rank
    with suppress(ConfigError):  # a process without a GPU of its own still has to report that to the others
        device = world.device.index if world.device.type == "cuda" else device
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(device),
        "MASTER_ADDR": _master_address(world, env),
        "MASTER_PORT": _master_port(world, env),
    }


def _master_address(world: World, env: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    if world.launcher == "srun":
        return first_host(env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST", "")))
    if world.size == 1:
        return "127.0.0.1"
    raise ConfigError(
        f"{world.launcher} started {world.size} processes but MASTER_ADDR is not set; set it to the "
        "host of rank 0 (mpirun: -x MASTER_ADDR=host)"
    )


def _master_port(world: World, env: Mapping[str, str]) -> str:
    if (port := env.get("MASTER_PORT")) is not None:
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"MASTER_PORT={port!r} of the environment is no port; it must be a number up to 65535"
            )
        return port
    if world.size == 1:
        with socket.socket() as probe:  # a free one: several single-process runs may share a machine
            probe.bind(("127.0.0.1", 0))
            return str(probe.getsockname()[1])
    return str(DEFAULT_PORT + int(env.get("SLURM_JOB_ID", 0)) % 1000)


def hold_meeting_port(world: World, run: str, env: Mapping[str, str] = os.environ) -> Store | None:
    """Rank 0 opens the port where all are to meet, before data is read: a run that finds it in use ends at once,
    and one that starts later finds this one's. The store that is returned keeps it open until `join` has made its
    own at the same port; None on other ranks, and where the launcher opens the port itself (torchrun), or where
    any free one will do. run: as of `join`.

    Raises ConfigError where the port cannot be opened."""
    if not world.is_main or _is_launchers_own(env) or (world.size == 1 and "MASTER_PORT" not in env):
        return None
    port = _master_port(world, env)
    try:
        # of this host whatever MASTER_ADDR is: `join` says where that is wrong
        store: Store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", int(port), is_master=True, wait_for_workers=False, multi_tenant=True
        )
        store.set("run", _named(run))
        return store
    except dist.DistError as error:
        raise _cannot_open(port, error) from error


def _is_launchers_own(env: Mapping[str, str]) -> bool:
    """Whether the launcher (torchrun) serves the store where all meet."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _cannot_open(port: str, error: dist.DistError) -> ConfigError:
    why = "is in use, by another run perhaps" if "EADDRINUSE" in str(error) else "cannot be opened"
    said = "" if "EADDRINUSE" in str(error) else f" ({reason_of(error)[:200]})"
    return ConfigError(
        f"port {port} of this host, where the processes are to meet, {why}{said}; {ANOTHER_PORT}"
    )


def join(
    world: World,
    timeout: timedelta = timedelta(minutes=30),
    *,
    refusal: UserError | None = None,
    run: str = "",
) -> None:
    """Makes the process group and takes this process's device. Collective.

    refusal: the error for which this process cannot run. It is raised here, and as a UserError with its
    message on all other processes, before any device is taken: the others shall not wait for a host that
    lacks the data. run: what tells this run from others on one host (its work directory).
    """
    os.environ.update(rendezvous(world))
    store, joined_before = _meet(world, timeout, refusal or _reason_against_joining(world), run)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        build_extension("ShareMemCommBuilder")  # DeepSpeed's own collectives on one host
    try:
        if joined_before:
            _make_group_anew(world, timeout, PrefixStore(f"group/{joined_before}", store))
        adopt(timeout)
        del store  # not earlier: rank 0 serves the group's own store at the same port
        if world.device.type == "cpu":
            dist.barrier()
            forget_shared_buffer(world.rank)
    except RuntimeError as error:
        if PEER_GONE.search(str(error)) is None:
            raise
        free = shutil.disk_usage("/dev/shm").free / 2**20
        raise Lost(
            f"another process ended while all met, as rank {world.rank} on host {socket.gethostname()} "
            f"sees it ({reason_of(error)[:200]}); what it said is the reason, or where a signal killed it, "
            f"want of memory: {free:.0f} MiB are free in /dev/shm here, and DeepSpeed's collectives on CPUs "
            "take 66 for each process"
        ) from error


def _make_group_anew(world: World, timeout: timedelta, store: Store) -> None:
    """The group of processes that have had one: in the store that its launcher keeps, torch would find the
    addresses of the last."""
    from deepspeed.accelerator import get_accelerator

    backend = get_accelerator().communication_backend_name()
    dist.init_process_group(backend, timeout=timeout, store=store, rank=world.rank, world_size=world.size)


def _reason_against_joining(world: World) -> UserError | None:
    """Why this process cannot run, where the environment and the host alone tell: a device that cannot be
    meant, or a /dev/shm without room."""
    try:
        kind = device_type()
    except ConfigError as error:
        return error
    return _no_shared_memory(world) if kind == "cpu" and world.size > 1 else None


def _no_shared_memory(world: World) -> HostError | None:
    """The refusal of a host whose /dev/shm has no room for the buffers of DeepSpeed's collectives on CPUs,
    which would end in a segmentation fault.

    Called before any process has taken its own buffer: each looks for the room of its own and of those with a
    lower local rank, so the last process of the host looks for all of them. What lies there under a buffer's
    name, of a run that was killed while it joined, is used again and counts as room.
    """
    free, needed = shutil.disk_usage("/dev/shm").free, (world.local_rank + 1) * SHARED_BUFFER_BYTES
    for rank in range(world.rank - world.local_rank, world.rank + 1):
        with suppress(FileNotFoundError):
            free += shared_buffer_file(rank).stat().st_blocks * 512
    if free >= needed:
        return None
    return HostError(
        f"/dev/shm has {free / 2**20:.0f} MiB free and DeepSpeed's collectives on CPUs take "
        f"{SHARED_BUFFER_BYTES / 2**20:.0f} for each process; {MORE_SHARED_MEMORY}, or see what fills it"
    )


def adopt(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Makes DeepSpeed use the process group that exists, or make one. Raises ConfigError if DeepSpeed was
    imported before `INTERNSEG_DEVICE=cpu` was known."""
    import deepspeed  # here: it takes 6 seconds, and code that only reads the environment does without
    from deepspeed.accelerator import get_accelerator

    if device_type() == "cpu" and (chosen := get_accelerator().device_name()) != "cpu":
        raise ConfigError(
            f"{VARIABLE}=cpu, but deepspeed was imported before internseg_ds and has chosen {chosen}; set "
            "DS_ACCELERATOR=cpu too"
        )
    with prints_logged():
        deepspeed.init_distributed(timeout=timeout, verbose=False)


def _meet(world: World, timeout: timedelta, refusal: UserError | None, run: str) -> tuple[Store, int]:
    """The store of all processes, once each has reported that it can run, and how often they have met there
    before. Raises UserError on all when one cannot. Collective."""
    if refusal is not None and world.size == 1:
        raise refusal
    waiting = timeout if refusal is None else REFUSAL
    try:
        store, *_ = next(make_stores("env://", world.rank, world.size, timeout=waiting))
        _check_only_run(store, world, run)
        # a process that joins again may find the store of the last time, with what was said then
        joined_before = store.add(f"joins/{world.rank}", 1) - 1
        first_refusal = _exchange_refusals(PrefixStore(f"join/{joined_before}", store), world, refusal)
    except dist.DistError as error:
        if refusal is not None:
            raise refusal from None  # whether the others have come or not
        raise _not_met(world, error) from error
    if first_refusal:
        # a HostError would be printed by every rank that raises one, and rank 0 prints the first already
        own = None if isinstance(refusal, HostError) else refusal
        raise own or UserError(first_refusal)
    return store, joined_before


def _named(run: str) -> str:
    return json.dumps([socket.gethostname(), run])


def _check_only_run(store: Store, world: World, run: str) -> None:
    """Raises ConfigError where the store is that of another run on this host, whose rank 0 opened the port first
    (this run's rank 0 says so); HostError where another process has come as the same rank. Collective."""
    if _is_launchers_own(os.environ):
        return
    came, own = f"came/{world.rank}", json.dumps([socket.gethostname(), os.getpid()])
    if store.check([came]) and store.get(came).decode() == own:
        return  # it has joined here before, for another engine perhaps, with a name of its own
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if world.is_main:
        store.set("run", _named(run))
    host, other = json.loads(store.get("run"))
    if host == socket.gethostname() and other != run:
        raise ConfigError(f"at {where} the processes of another run meet, that of {other}; {ANOTHER_PORT}")
    if store.compare_set(came, "", own).decode() != own:
        raise HostError(
            f"two processes have come to {where} as rank {world.rank} of {world.size}, so two runs meet at one port; "
            f"{ANOTHER_PORT}"
        )


def _exchange_refusals(store: Store, world: World, refusal: UserError | None) -> str:
    """The message of the lowest rank that refuses to run; "" if none does. Collective."""
    own = f"{refusal} (on host {socket.gethostname()})" if refusal is not None else ""
    store.set(f"refusal/{world.rank}", own)
    if world.is_main:
        messages = [store.get(f"refusal/{rank}").decode() for rank in range(world.size)]
        store.set("refusal", next(filter(None, messages), ""))
    first = store.get("refusal").decode()
    readers = store.add("read", 1)
    # rank 0 is about to raise, and its store would end with it: the others must have read theirs
    while first and world.is_main and readers < world.size:
        time.sleep(0.05)
        readers = store.add("read", 0)
    return first


def _not_met(world: World, error: dist.DistError) -> ConfigError | Lost:
    """The error of a process that could not meet the others."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if world.is_main and "EADDRINUSE" in str(error):
        return _cannot_open(port, error)
    return Lost(
        f"rank {world.rank} on host {socket.gethostname()} has not met the others at {address}:{port}, or "
        f"one went away ({reason_of(error)[:300]}); what the others said first is the reason"
    )


def gather_from_ranks(value: Any) -> list[Any]:
    """The `value` of every rank, in the order of ranks; only this one's where there is no group.
    Collective."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def raise_on_every_rank(error: UserError | None) -> None:
    """Raises the error of the first rank that has one, with its class and text, on every rank. Collective.

    For what one rank finds by itself (a full disk, a damaged file): it must not raise where others wait for it.
    """
    errors = [each for each in gather_from_ranks(error and (type(error), str(error))) if each is not None]
    if errors:
        kind, text = errors[0]
        raise kind(text)


class AnyRankFlags:
    """Facts of which each rank learns whether they hold on any rank.

    `AnyRankFlags(...)` sends this rank's, without waiting for the GPU; `result` waits until they are exchanged,
    and for what the GPU was given before, not for what it was given since. Collective, both.
    """

    def __init__(self, facts: Sequence[bool], device: torch.device) -> None:
        # filled on the device: a copy from the host would wait for the GPU
        own = torch.cat([torch.full((1,), int(fact), dtype=torch.int32, device=device) for fact in facts])
        dist.all_reduce(own, dist.ReduceOp.MAX)
        self._of_any = own.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def result(self) -> list[bool]:
        """For each fact, whether it holds on any rank."""
        if self._event is not None:
            self._event.synchronize()
        return [bool(fact) for fact in self._of_any.tolist()]


def any_rank(facts: Sequence[bool], device: torch.device) -> list[bool]:
    """For each fact, whether it holds on any rank. Collective."""
    return AnyRankFlags(facts, device).result()


def leave() -> None:
    """Ends the process group, if there is one. A rank that exits without it can abort while another still
    sends to it."""
    if dist.is_initialized():
        # DeepSpeed's function also drops the groups that DeepSpeed has made, which the next engine of this
        # process would use
        from deepspeed import comm

        comm.destroy_process_group()
