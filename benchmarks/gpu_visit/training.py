"""Training steps of a recipe on this card: several micro-batches and recomputation policies on one engine,
each beside its plan, and a profile.

Images lie on the device, losses, backward pass and optimizer are the real ones. One engine serves all
settings, since building 6 B takes longer than measuring them: the policy of a live model can be changed, and
so can the number of images, where gradients are not accumulated.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from timing import finish, peak_bytes, reset_peak, train_step
from workload import ROOT, Workload, loader, on_device, size_of

from gpu_visit.profile import profile_of
from gpu_visit.results import identity
from gpu_visit.scripts import run_script
from gpu_visit.visit import Spoilt, Visit, data_sheet
from internseg_ds import SegmentorEngine
from internseg_ds.config.ds_config import DsConfig
from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.loading import Batch
from internseg_ds.distributed.construction import build_on_meta, set_activation_checkpointing
from internseg_ds.distributed.precision import set_fp32_matmul
from internseg_ds.errors import ConfigError
from internseg_ds.models.activation_checkpointing import CheckpointingPolicy
from internseg_ds.planning.auto_checkpointing import FASTEST_FIRST, least_checkpointing
from internseg_ds.planning.devices import DEVICES, Cluster
from internseg_ds.planning.estimate import estimate_step
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.flops import TrainingPass
from internseg_ds.planning.memory_estimate import FRAGMENTATION, Platform
from internseg_ds.planning.step_time import Assumptions
from internseg_ds.preflight.model_checks import check_forward

DS_CONFIGS = ("zero1_bf16", "zero3_bf16_offload_optimizer", "zero3_bf16_offload_all")
"""In the order of preference on one GPU: the first that fits by the plan is taken."""
WARMUP, STEPS = 3, 5
PROFILED = 2
AT_PEAK = Assumptions(compute=1.0, link=1.0)
UNKNOWN = DEVICES["H100"]
"""Whose rates a card is estimated with that `planning.devices` does not know, and a CPU."""


@dataclass(frozen=True)
class Setting:
    micro_batch: int
    recomputation: CheckpointingPolicy
    fp32_matmul: str = "tf32"


def full_tuning(
    visit: Visit,
    *,
    config: str,
    side_px: int,
    micro_batches: Sequence[int],
    heads_dtype: str = "float32",
    policies: Sequence[CheckpointingPolicy] = (),
    warmup: int = WARMUP,
    steps: int = STEPS,
) -> None:
    """The first micro-batch with what "auto" chooses, a profile of it, then other policies and micro-batches.
    policies: () for all."""
    _measured(
        visit,
        _workload(config, side_px, heads_dtype),
        micro_batches,
        policies or FASTEST_FIRST,
        warmup,
        steps,
        ieee=heads_dtype == "float32",
    )


def recipe(
    visit: Visit,
    *,
    config: str,
    side_px: int,
    micro_batches: Sequence[int],
    cells: int = 8,
    options: Mapping[str, Any] | None = None,
    policies: Sequence[CheckpointingPolicy] = (),
    warmup: int = WARMUP,
    steps: int = STEPS,
) -> None:
    """Some micro-batches, each with the policy that "auto" would choose for it."""
    _measured(
        visit,
        _workload(config, side_px, "float32", cells=cells, options=options),
        micro_batches,
        policies[:1],
        warmup,
        steps,
        ieee=False,
    )


def beside_bare_deepspeed(visit: Visit) -> None:
    """Ours and the same model in a bare DeepSpeed loop (benchmarks/train_step.py), under the ds_config that
    fits this card."""
    size = ["--size", "tiny"] if visit.rehearse else ["--size", "6b"]
    config = (
        "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
        if visit.rehearse
        else _workload_of_6b().config
    )
    path = fitting(
        Workload(
            config=config,
            micro_batch=2,
            options={"engine.recomputation": "config"},
            image_px=112 if visit.rehearse else 504,
        ),
        visit,
    )
    run_script(
        visit,
        "train_step.py",
        [
            *size,
            "--world",
            "1",
            "--contenders",
            "ours",
            "bare_deepspeed",
            "--rounds",
            "1",
            "--warmup",
            "3",
            "--steps",
            "2" if visit.rehearse else "5",
            "--timeout",
            "140",
            "--deepspeed_config",
            str(path),
        ],
    )


def _workload_of_6b() -> Workload:
    return Workload(**size_of("6b", "SyncBN"))


def _workload(
    config: str, side_px: int, heads_dtype: str, *, cells: int = 8, options: Mapping[str, Any] | None = None
) -> Workload:
    """The recipe with its drop-path, which costs time and memory in a real training."""
    recipe_ = read_experiment(str(ROOT / config))
    kept = {"model.backbone.drop_path_rate": recipe_.model.backbone.get("drop_path_rate", 0.0)}
    return Workload(
        config=config,
        image_px=side_px,
        cells=cells,
        micro_batch=1,
        options={
            **kept,
            "engine.recomputation": "auto",
            "engine.heads_dtype": heads_dtype,
            "engine.peak_tflops": 1.0,
            **(options or {}),
        },
    )


def _measured(
    visit: Visit,
    workload: Workload,
    micro_batches: Sequence[int],
    policies: Sequence[CheckpointingPolicy],
    warmup: int,
    steps: int,
    *,
    ieee: bool,
) -> None:
    first = replace(workload, micro_batch=micro_batches[0])
    path = fitting(first, visit)
    plans = Plans(workload, path, visit)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="on_one_gpu_") as folder,
        _engine(first, path, Path(folder)) as engine,
    ):
        finish(engine.world.device)
        visit.measure(
            "start",
            {
                "config": Path(workload.config).stem,
                "ds_config": path.stem,
                "heads": workload.options["engine.heads_dtype"],
            },
            lambda: {
                "engine_built_s": round(time.monotonic() - began, 1),
                "parameters": sum(plans.of(micro_batches[0]).setting_sizes),
            },
        )
        auto = Estimator(engine.plan.experiment, engine.plan.meta_model, crop=engine.plan.crop).checkpointing
        engine.deepspeed.train()

        def run(setting: Setting) -> None:
            settings = {
                "config": Path(workload.config).stem,
                "side_px": workload.image_px,
                "micro_batch": setting.micro_batch,
                "recomputation": setting.recomputation,
                "ds_config": path.stem,
                "heads": {"bfloat16": "bf16"}.get(
                    workload.options["engine.heads_dtype"],
                    {"tf32": "TF32", "ieee": "fp32"}[setting.fp32_matmul],
                ),
            }
            if visit.is_had("training step", settings):
                return
            if refused := plans.refused(setting.micro_batch):
                visit.skip("training step", settings, refused)
                return
            planned = plans.figures(setting)
            if visit.device.type == "cuda" and planned.get("peak_gib", 0) * 2**30 > plans.device_bytes:
                why = (
                    f"{planned['peak_gib']:.1f} GiB by the plan, and there are "
                    f"{plans.device_bytes / 2**30:.1f}"
                )
                visit.skip("training step", settings, why, planned=planned)
                return
            line = visit.measure(
                "training step",
                settings,
                lambda: _step(engine, workload, setting, plans, warmup, steps),
                planned=planned,
            )
            if line is not None and line["status"] != "measured":
                # DeepSpeed's buckets are in the middle of a pass
                raise Spoilt(f"{settings}: {line['status']}")

        run(Setting(micro_batches[0], auto))
        visit.measure(
            "profile",
            {
                "config": Path(workload.config).stem,
                "micro_batch": micro_batches[0],
                "recomputation": auto,
                "heads": workload.options["engine.heads_dtype"],
            },
            lambda: _profiled(engine, workload, Setting(micro_batches[0], auto), Path(folder)),
        )
        for policy in policies:
            run(Setting(micro_batches[0], policy))
        for micro_batch in micro_batches[1:]:
            for policy in policies or (_auto(plans, micro_batch),):
                run(Setting(micro_batch, policy))
        if ieee:
            run(Setting(micro_batches[0], auto, "ieee"))


def _auto(plans: "Plans", micro_batch: int) -> CheckpointingPolicy:
    return least_checkpointing(plans.of(micro_batch), plans.ds, plans.platform)


def fitting(workload: Workload, visit: Visit) -> Path:
    """The ds_config that was asked for, else the first of DS_CONFIGS that fits this card and host by the
    plan; the first of them on a CPU."""
    if visit.ds_config is not None:
        return visit.ds_config
    paths = [ROOT / "ds_configs" / f"{name}.json" for name in DS_CONFIGS]
    if visit.device.type != "cuda":
        return paths[0]
    estimator = Estimator(read_experiment(workload.experiment), crop=(workload.image_px,) * 2)
    size, host = torch.cuda.get_device_properties(0).total_memory, psutil.virtual_memory().total
    for path in paths:
        ds, _ = estimator.resolve(path, 1)
        chooses = estimator.experiment.engine.recomputation == "auto"
        least = estimator.under("blocks") if chooses else estimator
        platform = Platform(size, host_bytes=host, compute=torch.bfloat16)
        if least.training_memory(ds, platform).fits:
            return path
    raise ConfigError(
        f"none of {', '.join(DS_CONFIGS)} fits {size / 2**30:.0f} GiB and a host of {host / 2**30:.0f} by "
        "the plan"
    )


@contextmanager
def _engine(workload: Workload, path: Path, folder: Path) -> Iterator[SegmentorEngine]:
    engine = SegmentorEngine(
        workload.experiment, path, work_dir=folder / "work", validate=False, heartbeat_timeout=0
    )
    try:
        yield engine
    finally:
        engine.watch.close()  # the process ends next, and DeepSpeed's tidying takes time


def batches(workload: Workload, micro_batch: int, device: torch.device) -> Batch:
    """One micro-batch, on the device."""
    made = next(iter(loader(replace(workload, micro_batch=micro_batch), 0, 1)))
    return Batch(on_device(made, device), position=0)


def _step(
    engine: SegmentorEngine, workload: Workload, setting: Setting, plans: "Plans", warmup: int, steps: int
) -> Mapping[str, Any]:
    device = engine.world.device
    set_activation_checkpointing(engine.deepspeed.module, setting.recomputation)
    set_fp32_matmul(setting.fp32_matmul, device)
    batch = batches(workload, setting.micro_batch, device)
    for _ in range(warmup):
        train_step(engine, batch)
    reset_peak(device)
    stamps = [_stamp(device)]
    for _ in range(steps):
        loss = train_step(engine, batch)
        stamps.append(_stamp(device))
    value = loss.item()  # waits for the device
    each = [_between(*pair) for pair in pairwise(stamps)]
    seconds = sum(each) / steps
    flops = plans.estimator(setting).training_pass.model_flops * setting.micro_batch
    set_fp32_matmul("tf32", device)
    return {
        "step_s": round(seconds, 5),
        "fastest_s": round(min(each), 5),
        "slowest_s": round(max(each), 5),
        "images_per_s": round(setting.micro_batch / seconds, 4),
        "model_tflop": flops / 1e12,
        "model_tflops": flops / seconds / 1e12,
        "peak_gib": round(peak_bytes(device) / 2**30, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 3)
        if device.type == "cuda"
        else None,
        "loss": value,
    }


def _stamp(device: torch.device) -> Any:
    """A moment in the device's order of work, which it is not waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _profiled(
    engine: SegmentorEngine, workload: Workload, setting: Setting, folder: Path
) -> Mapping[str, Any]:
    set_activation_checkpointing(engine.deepspeed.module, setting.recomputation)
    batch = batches(workload, setting.micro_batch, engine.world.device)
    return profile_of(engine, batch, PROFILED, folder / "profile")


class Plans:
    """The estimates of each setting: made when it is asked for, since each takes seconds."""

    def __init__(self, workload: Workload, ds_config: Path, visit: Visit) -> None:
        self.workload, self.ds_config = workload, ds_config
        self.card = data_sheet(identity(visit.rehearse)["card"])
        gpu = visit.device.type == "cuda"
        self.device_bytes = (
            torch.cuda.get_device_properties(0).total_memory if gpu else psutil.virtual_memory().total
        )
        self.platform = Platform(self.device_bytes, compute=torch.bfloat16)
        self._estimators: dict[tuple[int, str], Estimator] = {}
        self._passed: dict[CheckpointingPolicy, TrainingPass] = {}
        self._refused: dict[int, str] = {}
        self.ds: DsConfig = self.of(1).resolve(ds_config, 1)[0]

    def of(self, micro_batch: int, fp32_matmul: str = "tf32") -> Estimator:
        if (micro_batch, fp32_matmul) not in self._estimators:
            workload = replace(
                self.workload,
                micro_batch=micro_batch,
                options={**self.workload.options, "engine.fp32_matmul": fp32_matmul},
            )
            self._estimators[micro_batch, fp32_matmul] = Estimator(
                read_experiment(workload.experiment), crop=(workload.image_px,) * 2
            )
        return self._estimators[micro_batch, fp32_matmul]

    def refused(self, micro_batch: int) -> str:
        """Why so few images cannot be trained on: the sentence of a run that tries; empty where they can."""
        if micro_batch not in self._refused:
            image = torch.empty(3, self.workload.image_px, self.workload.image_px, device="meta")
            try:
                check_forward(
                    build_on_meta(self.of(micro_batch).experiment.model), {"img": image}, micro_batch, 1
                )
            except ConfigError as error:
                self._refused[micro_batch] = str(error)
            else:
                self._refused[micro_batch] = ""
        return self._refused[micro_batch]

    def estimator(self, setting: Setting) -> Estimator:
        """Of a setting. What an image costs depends on the policy alone, and is counted once for it."""
        estimator = self.of(setting.micro_batch, setting.fp32_matmul).under(setting.recomputation)
        if setting.recomputation in self._passed:
            estimator.training_pass = self._passed[setting.recomputation]
        self._passed[setting.recomputation] = estimator.training_pass
        return estimator

    def figures(self, setting: Setting) -> dict[str, Any]:
        """Seconds and GiB by the plan; at_peak: what the parts of a step take at the rates of the data sheet,
        from which the assumed shares can be fitted."""
        try:
            estimator = self.estimator(setting)
            found = estimator.training_memory(self.ds, self.platform)
            cluster = Cluster(self.card or UNKNOWN, 1, 1, 50.0)
            ds, _ = estimator.resolve(self.ds_config, 1)
            time_, floor = (
                estimate_step(estimator, ds, cluster, assumed).time for assumed in (Assumptions(), AT_PEAK)
            )
        except ConfigError as error:
            return {"unplanned": str(error).splitlines()[0]}
        own = {part.name: part.device for part in found.parts if found.fullest in part.phases}
        tensors = found.peak - own.get("fragmentation", 0) - own.get("process and context", 0)
        return {
            "step_s": round(time_.total, 5),
            "images_per_s": round(setting.micro_batch / time_.total, 4),
            "peak_gib": round(found.peak / 2**30, 2),
            "tensors_gib": round(tensors / 2**30, 2),
            "fragmentation": FRAGMENTATION,
            "sheet": (self.card or UNKNOWN).name if self.card else "",
            "at_peak": {"compute_s": floor.floor, "update_s": floor.update, "host_s": floor.host},
            "offloaded": bool(found.host > 8 * 2**30),
            "cores": os.cpu_count(),
        }
