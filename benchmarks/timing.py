"""What the benchmarks measure with: seconds per step, peak memory of the timed steps, and the rate at which
this machine multiplies matrices."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # the published contenders register a backbone of the same name as ours
    from internseg_ds import SegmentorEngine
    from internseg_ds.data.loading import Batch


T = TypeVar("T")


@dataclass
class Timed:
    """seconds, cpu_seconds: per step, of the clock and of this process's work (which other programs on the
    machine disturb less). losses: of the first steps, means over the ranks. peak_bytes: the largest of any
    rank during the timed steps."""

    seconds: float
    losses: list[float]
    peak_bytes: int
    cpu_seconds: float


def time_steps(step: Callable[[], Tensor], warmup: int, steps: int, device: torch.device) -> Timed:
    """step: one optimizer step, which returns this rank's loss. The first `warmup` steps are not timed; their
    losses are kept. Collective."""
    losses = []
    for _ in range(warmup):
        losses.append(mean_over_ranks(step().detach()))
    reset_peak(device)
    dist.barrier()
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss = step()
    loss.item()  # waits for the device, as a log record does
    seconds, cpu_seconds = (time.perf_counter() - began) / steps, (time.process_time() - cpu_began) / steps
    return Timed(seconds, losses, peak_bytes(device), cpu_seconds)


def in_turn(contenders: Sequence[T], rounds: int) -> Iterator[T]:
    """Each once a round, and another one first in each."""
    for number in range(rounds):
        first = number % len(contenders)
        yield from (*contenders[first:], *contenders[:first])


def train_on(engine: "SegmentorEngine", steps: int, log_every: int) -> None:
    """Some more steps of the real loop, which saves nothing on its way. Collective."""
    experiment = engine.plan.experiment
    schedule = replace(experiment.schedule, max_steps=engine.state.step + steps)
    experiment = replace(
        experiment,
        schedule=schedule,
        checkpoints=replace(experiment.checkpoints, interval=0),
        logging=replace(experiment.logging, interval=log_every),
    )
    engine.plan = replace(engine.plan, experiment=experiment)
    engine.train()


def train_step(engine: "SegmentorEngine", batch: "Batch") -> Tensor:
    """One optimizer step of one micro-batch, without the loop around it; returns the loss. Collective."""
    loss = engine.forward(batch)["loss"]
    engine.deepspeed.backward(loss)
    engine.deepspeed.step()
    return loss


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.float().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of VmHWM (Linux, proc(5))


def peak_bytes(device: torch.device) -> int:
    """Since `reset_peak`, the most that any rank had allocated on its GPU, or held in resident memory where
    it has none. Collective."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
        )
        peak = 1024 * int(line.split()[1])
    most = torch.tensor([peak], dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


def matmul_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of this process in its fastest of many products of square matrices, while all ranks do the same.
    Collective."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    dist.barrier()
    while time.perf_counter() - began < seconds or best == float("inf"):
        finish(device)
        start = time.perf_counter()
        a @ b
        finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def seconds_per_call(
    run: Callable[[], object], device: torch.device, *, seconds: float = 0.3, rounds: int = 5
) -> tuple[float, float]:
    """(fastest, median) of some rounds of calls, which take so many seconds together; on a GPU by its own
    clock, with no wait between the calls of a round."""
    for _ in range(3):
        run()
    finish(device)
    began = time.perf_counter()
    run()
    finish(device)
    calls = max(1, int(seconds / rounds / max(time.perf_counter() - began, 1e-7)))
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3 / calls)
        else:
            start_s = time.perf_counter()
            for _ in range(calls):
                run()
            taken.append((time.perf_counter() - start_s) / calls)
    return min(taken), statistics.median(taken)


def finish(device: torch.device) -> None:
    """Waits for the kernels in flight."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
