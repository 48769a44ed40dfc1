"""How well the hardware is used: images per second, model FLOPs utilization, share of time spent waiting for
data, peak memory. For the log records.

In: what `StepMetrics` counted, the FLOPs of an image (`planning.flops`), and the peak of matrix products,
which `engine.peak_tflops` names or `matmul_peak` measures. MFU and HFU are those of PaLM (Chowdhery et al.
2022, appendix B): FLOPs a second over the peak, without and with recomputation.
"""

import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer

from internseg_ds.distributed.process_group import World, gather_from_ranks
from internseg_ds.errors import reason_of
from internseg_ds.monitoring.step_metrics import StepMetrics
from internseg_ds.planning.flops import TrainingPass

log = logging.getLogger(__name__)

# large enough that a product is bound by multipliers and not by memory on every GPU of `planning.devices`
SIDE = 8192
"""Side of the square matrices that a GPU's peak is measured with."""
# some products each, and the start of a run hardly waits
MEASURED_S = 0.05
"""Seconds for which each product is repeated."""


@dataclass(frozen=True)
class Peak:
    """model_flops, hardware_flops: of one training image, without and with recomputation. flops_per_s: of all
    devices together."""

    model_flops: int
    hardware_flops: int
    flops_per_s: float

    def utilization(self, images_per_s: float) -> dict[str, float]:
        """Shares of the peak: "mfu", "hfu"."""
        return {
            "mfu": self.model_flops * images_per_s / self.flops_per_s,
            "hfu": self.hardware_flops * images_per_s / self.flops_per_s,
        }


@dataclass
class Meter:
    """peak: None where it is not known, or proved wrong."""

    device: torch.device
    peak: Peak | None = None

    def values(self, metrics: StepMetrics, images: int) -> dict[str, float]:
        """For a log record. images: that all ranks trained on since the last one; those of skipped steps too,
        since they were computed."""
        seconds = metrics.seconds
        return {
            "images_per_s": images / seconds,
            **self._utilization(images / seconds),
            "data_wait": metrics.waited_s / seconds,
            "peak_gib": peak_bytes(self.device) / 2**30,
        }

    def _utilization(self, images_per_s: float) -> dict[str, float]:
        if self.peak is None:
            return {}
        found = self.peak.utilization(images_per_s)
        if found["hfu"] <= 1:
            return found
        log.info(
            "records go without mfu and hfu from here: %.0f %% of the peak were reached, so it is wrong, as one is "
            "that was measured while the device was busy; set engine.peak_tflops",
            100 * found["hfu"],
        )
        self.peak = None
        return {}


def make_meter(
    peak_tflops: float | None, count: Callable[[], TrainingPass], world: World, dtype: torch.dtype
) -> Meter:
    """The meter of this rank; that of rank 0 knows the model's FLOPs. Called before the model takes memory:
    what is measured here leaves neither memory nor a peak of it behind. Collective.

    peak_tflops: of one device, None to measure that of a GPU; a CPU's is shared with whatever else runs, so
    none is measured. count: counts the FLOPs of a training image. dtype: in which the backbone computes.
    """
    if peak_tflops is None and world.device.type == "cpu":
        return Meter(world.device)
    passed = flops_of(count) if world.is_main else None
    if not any(gather_from_ranks(passed is not None)):
        return Meter(world.device)
    if peak_tflops is not None:
        flops_per_s = world.size * 1e12 * peak_tflops
    else:
        flops_per_s = sum(gather_from_ranks(matmul_peak(dtype, world)))
    if passed is None:
        return Meter(world.device)
    hardware_flops = passed.model_flops + passed.backbone_recomputed
    return Meter(world.device, Peak(passed.model_flops, hardware_flops, flops_per_s))


def flops_of(count: Callable[[], TrainingPass]) -> TrainingPass | None:
    """The FLOPs of a training image; None, and a line in the log, where they cannot be counted."""
    try:
        return count()
    except Exception as error:  # whatever a part of somebody's model refuses with: no reason not to train
        log.info("records go without mfu and hfu: the model's FLOPs cannot be counted (%s)", reason_of(error))
        return None


def matmul_peak(dtype: torch.dtype, world: World) -> float:
    """FLOP/s of square matrix products in `dtype` on this rank's device, measured on all ranks at the same
    time, since they may share a machine. Collective.

    The fastest of some blocks of products, which other work disturbs least, of normally distributed numbers
    (of zeros, a GPU multiplies faster). Logs the mean over ranks.
    """
    device = world.device
    generator = torch.Generator(device).manual_seed(0)  # its own: the training's stays where it is
    if dist.is_initialized():
        dist.barrier()
    a = torch.randn(SIDE, SIDE, dtype=dtype, device=device, generator=generator)
    b = torch.randn(SIDE, SIDE, dtype=dtype, device=device, generator=generator)
    timer = Timer(
        "torch.mm(a, b, out=product)",
        globals={"torch": torch, "a": a, "b": b, "product": torch.mm(a, b)},
        num_threads=torch.get_num_threads(),
    )
    peak = 2 * SIDE**3 / min(timer.blocked_autorange(min_run_time=MEASURED_S).times)
    del a, b, timer
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    of_all = gather_from_ranks(peak)
    log.info(
        "mfu and hfu are relative to %.4g TFLOP/s per process: products of %d x %d matrices in %s, "
        "measured%s; engine.peak_tflops names another peak",
        sum(of_all) / len(of_all) / 1e12,
        SIDE,
        SIDE,
        str(dtype).removeprefix("torch."),
        f" on {len(of_all)} processes at once" if len(of_all) > 1 else "",
    )
    return peak


def peak_bytes(device: torch.device) -> int:
    """The most memory since the engine was built, evaluations and saves included: on a GPU of torch's tensors,
    on a CPU resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on Linux
