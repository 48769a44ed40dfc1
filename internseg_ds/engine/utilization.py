"""How well the hardware is used: images per second, model FLOPs utilization, share of time spent waiting for data, peak memory. For the log records.

In: what an `Interval` counted, the FLOPs of an image (`planning.training_pass`), and the peak of matrix products, which `engine.peak_tflops` names or
`matmul_peak` measures. MFU and HFU are those of PaLM (Chowdhery et al. 2022, appendix B): FLOPs a second over the peak, without and with recomputation.
"""

import logging
import resource
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.benchmark import Timer

from internseg_ds.distributed.process_group import World, of_all_ranks
from internseg_ds.engine.interval import Interval
from internseg_ds.errors import reason_of
from internseg_ds.planning.training_pass import TrainingPass, training_pass

log = logging.getLogger(__name__)

SIDE = 8192
"""Of the square matrices that a GPU's peak is measured with."""
MEASURED_S = 0.05
"""For how long each product is repeated."""


@dataclass
class Meter:
    """model_flops, hardware_flops: of one training image, without and with recomputation. peak: FLOP/s of all devices together. None: not known."""

    device: torch.device
    model_flops: int | None = None
    hardware_flops: int | None = None
    peak: float | None = None

    def values(self, interval: Interval, images: int) -> dict[str, float]:
        """For a log record. images: that all ranks trained on in this interval; those of skipped steps too, since they were computed."""
        seconds = interval.seconds
        values = {"images_per_s": images / seconds}
        hfu = self.hardware_flops * images / seconds / self.peak if self.peak else 0.0
        if hfu > 1:
            log.info(
                "records go without mfu and hfu from here: %.0f %% of the peak were reached, so it is wrong; was it measured while other work ran? "
                "engine.peak_tflops names another",
                100 * hfu,
            )
            self.peak = None
        elif self.peak:
            values |= {"mfu": self.model_flops * images / seconds / self.peak, "hfu": hfu}
        return values | {
            "data_wait": interval.waited_s / seconds,
            "peak_gib": peak_bytes(self.device) / 2**30,
        }


def make_meter(
    peak_tflops: float | None, meta_model: nn.Module, crop: tuple[int, int], world: World, dtype: torch.dtype
) -> Meter:
    """Before the model takes memory: what is measured here leaves neither memory nor a peak behind. Collective.

    peak_tflops: of one device, None to measure that of a GPU; a CPU's is shared with whatever else runs, so none is measured. crop: height and width of a
    training image. dtype: in which the backbone computes.
    """
    if peak_tflops is None and world.device.type == "cpu":
        return Meter(world.device)
    passed = flops_of(meta_model, crop) if world.is_main else None
    if not any(of_all_ranks(passed is not None)):
        return Meter(world.device)
    peak = (
        world.size * 1e12 * peak_tflops
        if peak_tflops is not None
        else sum(of_all_ranks(matmul_peak(dtype, world)))
    )
    return (
        Meter(world.device, passed.model_flops, passed.model_flops + passed.backbone_recomputed, peak)
        if passed
        else Meter(world.device)
    )


def flops_of(meta_model: nn.Module, crop: tuple[int, int]) -> TrainingPass | None:
    """What a training image costs; None, and a line in the log, where that cannot be told."""
    try:
        return training_pass(meta_model, *crop)
    except Exception as error:  # whatever a part of somebody's model refuses with: no reason not to train
        log.info("records go without mfu and hfu: the model's FLOPs cannot be counted (%s)", reason_of(error))
        return None


def matmul_peak(dtype: torch.dtype, world: World) -> float:
    """FLOP/s of square matrix products in `dtype` on this rank's device, with all ranks at it at the same time, since they may share a machine. Collective.

    The fastest of some blocks of products, which other work disturbs least, of normally distributed numbers (of zeros, a GPU multiplies faster).
    Logs the mean over ranks.
    """
    device = world.device
    generator = torch.Generator(device).manual_seed(0)  # its own: the training's stays where it is
    if dist.is_initialized():
        dist.barrier()
    a, b = (torch.randn(SIDE, SIDE, dtype=dtype, device=device, generator=generator) for _ in range(2))
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
    of_all = of_all_ranks(peak)
    log.info(
        "mfu and hfu are relative to %.4g TFLOP/s per process: products of %d x %d matrices in %s, measured%s; engine.peak_tflops names another peak",
        sum(of_all) / len(of_all) / 1e12,
        SIDE,
        SIDE,
        str(dtype).removeprefix("torch."),
        f" on {len(of_all)} processes at once" * (len(of_all) > 1),
    )
    return peak


def peak_bytes(device: torch.device) -> int:
    """Most memory since the engine was built, evaluations and saves included: on a GPU in torch's tensors, on a CPU resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on Linux
