"""A short run of a case on two processes: two steps and an evaluation."""

import json
import math
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmcv import Config

from tests.conftest import ROOT, free_port
from tests.end_to_end.every_model.cases import CASES, CROPS
from tests.end_to_end.every_model.parts import CROP
from tests.forks import start_ranks

STEPS = 2
LIMIT_S, LEAVE_S = 150, 5
"""In which a case must end, and a process whose other has ended."""


def experiment(model: dict[str, Any], data: Path, crop: int = CROP) -> Config:
    """The demo's data in crops of so many pixels, plain AdamW, STEPS steps and an evaluation."""
    cfg = Config.fromfile(ROOT / "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py")
    scale = (2 * crop, crop)
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="Resize", img_scale=scale),
        dict(type="RandomCrop", crop_size=(crop, crop)),
        dict(type="RandomFlip", prob=0.5),
        dict(type="Normalize", **cfg.img_norm_cfg),
        dict(type="Pad", size=(crop, crop), pad_val=0, seg_pad_val=255),
        dict(type="DefaultFormatBundle"),
        dict(type="Collect", keys=["img", "gt_semantic_seg"]),
    ]
    cfg.data.train.pipeline = pipeline
    cfg.data.val.pipeline[1].img_scale = scale
    for split in ("train", "val", "test"):
        cfg.data[split].data_root = str(data)
    cfg.data.samples_per_gpu, cfg.data.workers_per_gpu = 2, 0
    cfg.model = model
    import mmcls.models  # noqa: F401 - registers its backbones

    cfg.optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.01)
    cfg.optimizer_config = dict(grad_clip=dict(max_norm=1.0))
    cfg.engine = dict(backbone_dtype="bfloat16", peak_tflops=0.4)
    cfg.runner.max_iters = STEPS
    cfg.evaluation.interval = STEPS
    cfg.evaluation.save_best = None
    cfg.log_config = dict(interval=1, hooks=[])
    return cfg


def run(name: str, data: Path, work_dir: Path) -> str:
    """Two steps, an evaluation, and a forward from whole and from partitioned weights; what is wrong, "" for
    nothing. Collective."""
    from internseg_ds import SegmentorEngine
    from internseg_ds.distributed.gathering import forwards

    crop = CROPS.get(name, CROP)
    with SegmentorEngine(
        experiment(CASES[name], data, crop),
        ROOT / "ds_configs/zero3_bf16.json",
        work_dir=work_dir,
        saves=False,
    ) as engine:
        engine.train()
        image, logits = torch.randn(1, 3, crop, crop, generator=torch.Generator().manual_seed(0)), []
        for weights in ("whole", "partitioned"):
            with forwards(
                engine.deepspeed.module,
                engine.plan.experiment.model,
                engine.dtypes.backbone,
                engine.world.device,
                heads=engine.dtypes.heads,
                weights=weights,
            ) as ready:
                logits.append(ready(image, [{}]))
                ready.finish()
    if not torch.allclose(*logits, rtol=1e-2, atol=1e-2):
        return (
            "whole and partitioned weights segment differently, by up to "
            f"{(logits[0] - logits[1]).abs().max():.3g}"
        )
    if dist.get_rank() == 0:
        records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        if len(losses) != STEPS or not all(map(math.isfinite, losses)) or "mIoU" not in records[-1]:
            return f"losses {losses}, and {'a' if 'mIoU' in records[-1] else 'no'} score"
    return ""


def run_all(names: Sequence[str], data: Path, folder: Path) -> None:
    """On each rank: runs the cases in their order and writes what is wrong with NUMBER into
    folder/NUMBER.RANK. Ends at the first that fails, after which the ranks may no longer be in step."""
    os.chdir(ROOT)
    rank = int(os.environ["RANK"])
    with (folder / f"log.{rank}").open("w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    dist.init_process_group("gloo")
    for number, name in enumerate(names):
        try:
            wrong = run(name, data, folder / f"run_{number}")
        except Exception as error:
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        (folder / f"{number}.{rank}").write_text(wrong)
        if wrong:
            os._exit(1)
    dist.barrier()
    os._exit(0)  # without the ends of two processes to wait for


def sweep(names: Sequence[str], data: Path, folder: Path) -> dict[str, str]:
    """What is wrong with each case, "" for nothing, run by as few pairs of processes as there are failures,
    and one."""
    found: dict[str, str] = {}
    while rest := [name for name in names if name not in found]:
        place = folder / f"from_{len(found)}"
        place.mkdir(parents=True)
        ranks = start_ranks(run_all, 2, free_port(), rest, data, place)
        done, since = 0, time.monotonic()
        while all(rank.exitcode is None for rank in ranks) and time.monotonic() - since < LIMIT_S:
            time.sleep(0.05)
            if (now := len(list(place.glob("*.0")))) != done:
                done, since = now, time.monotonic()
        for rank in ranks:
            rank.join(LEAVE_S)
            rank.kill()
            rank.join()
        for number, name in enumerate(rest):
            said = [file.read_text() for file in sorted(place.glob(f"{number}.[01]"))]
            if len(said) < 2 or any(said):
                found[name] = next(filter(None, said), "one process ended or hung, and the other waited")
                break
            found[name] = ""
    return found
