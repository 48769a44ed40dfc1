"""Work directories as runs leave them, written by the code that writes them in a run."""

import json
import time
from pathlib import Path

import numpy as np

from internseg_ds.config.lr_schedule import LrSchedule
from internseg_ds.monitoring.evaluation_record import FOLDER, NO_CLASS, EvaluatedImage, EvaluationRecord
from internseg_ds.monitoring.loggers import JsonlLogger
from internseg_ds.monitoring.run_starts import RunStart, learning_rates, write_start

CLASSES = ["wall", "<script>alert(1)</script>", "tree & bush"]
BEGAN = 1_700_000_000.0


def evaluation(step: int, classes: list[str] = CLASSES) -> EvaluationRecord:
    """Of the last class 10 % is taken for the first, of the second one half."""
    confusion = np.array([[90, 10, 0, 0], [50, 50, 0, 0], [10, 0, 90, 0], [0, 0, 0, 0]])
    generator = np.random.default_rng(step)
    truth = generator.integers(0, 3, (20, 30)).astype(np.uint16)
    prediction = truth.copy()
    truth[0] = NO_CLASS
    image = generator.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    return EvaluationRecord(
        step=step,
        time=BEGAN + step,
        images=7,
        scores={"mIoU": 0.5, "aAcc": 230 / 300},
        classes=classes,
        palette=np.array([[120, 120, 120], [180, 0, 0], [0, 180, 0]], np.uint8),
        confusion=confusion,
        pictures=[
            EvaluatedImage("<b>one</b>.jpg", "fixed", 0.5, image, truth, prediction),
            EvaluatedImage("two.jpg", "best", 0.9, image, truth, prediction),
            EvaluatedImage("three.jpg", "worst", None, image, truth, prediction),
        ],
    )


def start(step: int, max_steps: int = 40) -> RunStart:
    schedule = LrSchedule(max_steps, "poly", {"power": 1.0, "warmup": "linear", "warmup_iters": 4})
    groups = [
        {"name": f"layer {layer}, {decay}", "lr": 1e-3 * 0.9 ** (3 - layer)}
        for layer in range(3)
        for decay in ("decay", "no decay")
    ]
    return RunStart(
        time=BEGAN + step,
        step=step,
        max_steps=max_steps,
        config="configs/<i>mine</i>.py",
        environment=["python 3.11", "command: train"],
        resume_command="deepspeed launch/train.py mine.py --resume auto",
        data={"training images": "23"},
        warnings=["data.train: class <u>ghost</u> occurs nowhere"],
        notes=[],
        learning_rates=learning_rates(schedule, groups, [10] * 6, step),
    )


def write_run(folder: Path, steps: int = 40, lr: float = 1e-3) -> Path:
    """A run of `steps` steps, evaluated every 10; a spike at step 30."""
    folder.mkdir(parents=True)
    write_start(folder, start(0))
    logger = JsonlLogger(folder / "metrics.jsonl", 0)
    for step in range(1, steps + 1):
        loss = 5.0 - step / 20 + (40 if step == 30 else 0)
        spikes = {"loss_spikes": 1} if step == 30 else {}
        logger.write(
            step, {"loss": loss, "grad_norm": 1.0, "lr": lr, "images_per_s": 4.0, "peak_gib": 2.5, **spikes}
        )
        if step % 10 == 0:
            scores = {"mIoU": float(step), "aAcc": 50.0}
            iou = {f"IoU.{name}": 100 * step / (100 + place) for place, name in enumerate(CLASSES)}
            logger.write(step, {**scores, **iou})
            evaluation(step).write(folder / FOLDER)
    skipped = {"step": 17, "ranks": [[{"loss": "nan", "images": ["<img src=x>.jpg"]}]]}
    (folder / "skipped_steps.jsonl").write_text(json.dumps(skipped) + "\n")
    (folder / "config.py").write_text(
        f"optimizer = dict(type='AdamW', lr={lr})\nname = '</pre><script>alert(2)</script>'\n"
    )
    (folder / "ds_config.json").write_text('{"bf16": {"enabled": true}}\n')
    return folder


def many_records(file: Path, count: int) -> None:
    """Records as a long run leaves them, one of each step; a spike of 57.25 at step `count` // 3."""
    began = time.time()
    with file.open("w") as out:
        for step in range(1, count + 1):
            loss = 57.25 if step == count // 3 else 1 + 0.001 * (step % 7)
            values = {f"term_{number}.loss": loss / 10 for number in range(4)}
            names = (
                "grad_norm",
                "grad_norm_max",
                "lr",
                "images_per_s",
                "mfu",
                "hfu",
                "data_wait",
                "peak_gib",
            )
            values |= dict.fromkeys(names, 0.5)
            out.write(json.dumps({"step": step, "time": began + step, "loss": loss, **values}) + "\n")
