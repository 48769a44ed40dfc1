"""Loading the 12 GB of the 6 B backbone's weights by the project's loader, and saving a checkpoint of as many
blocks as there is room for."""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from timing import finish, train_step
from workload import FULL, ROOT, TINY, Workload

from gpu_visit.training import fitting
from gpu_visit.visit import Visit
from internseg_ds import SegmentorEngine
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.distributed.construction import build_for_training
from internseg_ds.distributed.weight_loading import load, match_backbone
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import checkpoint_bytes
from internseg_ds.planning.zero_settings import ZeroSettings

DEPTHS = (48, 24, 12, 8)
SPARE = 0.8
"""Share of what is free that a file may take."""


def room(visit: Visit) -> tuple[Path, int]:
    """A folder for large files, and the bytes that may go there: --scratch, or the roomier of memory
    (/dev/shm) and the temporary folder."""
    folders = [visit.scratch] if visit.scratch else [Path("/dev/shm"), Path(tempfile.gettempdir())]
    free = {}
    for folder in folders:
        if folder.is_dir() and os.access(folder, os.W_OK):
            size = shutil.disk_usage(folder).free
            free[folder] = (
                min(size, psutil.virtual_memory().available // 2) if folder == Path("/dev/shm") else size
            )
    if not free:
        raise FileNotFoundError(f"{folders[0]} is no folder that can be written to")
    best = max(free, key=free.__getitem__)
    return best, int(SPARE * free[best])


def loading(visit: Visit) -> None:
    workload = Workload(
        config=TINY if visit.rehearse else FULL, image_px=112 if visit.rehearse else 504, micro_batch=1
    )
    experiment = read_experiment(workload.experiment)
    ds = resolve_ds_config(
        ROOT / "ds_configs/zero1_bf16.json",
        experiment="",
        micro_batch=1,
        world_size=1,
        optimizer=experiment.optimizer,
    )
    folder, free = room(visit)
    settings = {"config": Path(workload.config).stem, "folder": str(folder), "file": "safetensors, bf16"}

    def measured() -> Mapping[str, Any]:
        began = time.perf_counter()
        with torch.no_grad():
            model = build_for_training(experiment.model, ds, visit.device, seed=0)
        finish(visit.device)
        built_s = time.perf_counter() - began
        size = sum(param.numel() * param.element_size() for param in model.backbone.parameters())
        if size > free:
            raise OSError(f"{size / 2**30:.0f} GiB of weights and {free / 2**30:.0f} GiB of room in {folder}")
        with tempfile.TemporaryDirectory(dir=folder, prefix="on_one_gpu_") as name:
            path = Path(name, "weights.safetensors")
            kept = {
                key: value
                for key, value in model.backbone.state_dict().items()
                if not key.startswith(("up1.", "up2.", "up3.", "up4."))
            }
            save_file({key: value.cpu().contiguous() for key, value in kept.items()}, path)
            began = time.perf_counter()
            load(model, match_backbone(model, open_weights(path)))
            finish(visit.device)
            seconds = time.perf_counter() - began
            wrong = sum(
                not torch.equal(model.backbone.state_dict()[key], value) for key, value in kept.items()
            )
            return {
                "built_s": round(built_s, 2),
                "gb": path.stat().st_size / 1e9,
                "load_s": round(seconds, 3),
                "gbs": path.stat().st_size / 1e9 / seconds,
                "tensors_that_differ": wrong,
            }

    visit.measure("loading", settings, measured)


def saving(visit: Visit) -> None:
    """At once and in the background. A checkpoint of all of 6 B has 71 GiB; where there is no room for it,
    fewer blocks are saved, and the size is said."""
    folder, free = room(visit)
    for depth in DEPTHS if not visit.rehearse else (4,):
        workload = _workload(depth, visit.rehearse)
        path = fitting(workload, visit)
        estimator = Estimator(read_experiment(workload.experiment), crop=(workload.image_px,) * 2)
        ds, _ = estimator.resolve(path, 1)
        ema = estimator.experiment.engine.ema is not None
        size = checkpoint_bytes(estimator.model, ZeroSettings.of(ds), ema=ema, matrices=estimator.matrices)
        if size <= free:
            break
    else:
        visit.skip(
            "saving",
            {"folder": str(folder)},
            f"{size / 2**30:.0f} GiB for {depth} blocks, and {free / 2**30:.0f} GiB of room in {folder}",
        )
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="on_one_gpu_") as name:
        engine = SegmentorEngine(
            workload.experiment, path, work_dir=Path(name), validate=False, heartbeat_timeout=0
        )
        from gpu_visit.training import batches

        engine.deepspeed.train()
        train_step(engine, batches(workload, 2, engine.world.device))
        for background in (False, True):
            visit.measure(
                "saving",
                {"blocks": depth, "ds_config": path.stem, "folder": str(folder), "background": background},
                lambda background=background: _saved(engine, background, Path(name)),
            )


def _workload(depth: int, rehearse: bool) -> Workload:
    if rehearse:
        return Workload(config=TINY, micro_batch=2, options={"engine.peak_tflops": 1.0})
    quarter = depth // 4
    options = {
        "model.backbone.depth": depth,
        "model.backbone.out_indices": [quarter - 1, 2 * quarter - 1, 3 * quarter - 1, depth - 1],
        "optimizer.paramwise_cfg.num_layers": depth,
        "engine.peak_tflops": 1.0,
        "engine.recomputation": "blocks",
    }
    return Workload(config=FULL, image_px=504, micro_batch=2, options=options)


def _saved(engine: SegmentorEngine, background: bool, folder: Path) -> Mapping[str, Any]:
    engine.deepspeed.checkpoint_engine = NotingCheckpointEngine(
        engine.deepspeed._config, background=background
    )
    engine.state.step += 1
    began = time.perf_counter()
    engine.save()
    paused = time.perf_counter() - began
    engine.checkpoints.finish()
    published = time.perf_counter() - began
    tag = folder / "checkpoints" / str(engine.checkpoints.newest)
    size = sum(file.stat().st_size for file in tag.rglob("*") if file.is_file())
    shutil.rmtree(tag)
    return {
        "paused_s": round(paused, 3),
        "published_s": round(published, 3),
        "gib": round(size / 2**30, 3),
        "gbs": size / 1e9 / published,
    }
