"""Trackers around a real training that is interrupted and goes on."""

import json
import shutil
from pathlib import Path

import pytest
import wandb

from internseg_ds import SegmentorEngine
from internseg_ds.checkpoints.manifest import read_manifest
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.monitoring.trackers.test_tensorboard import read
from tests.monitoring.trackers.wandb_files import wandb_files
from tests.small_experiment import small_experiment


def train(root: Path, work_dir: Path, resume: str | Path | None) -> None:
    cfg = small_experiment(
        root,
        "runner.max_iters=4",
        "checkpoint_config.interval=2",
        "evaluation.interval=2",
        "engine.global_batch=2",
    )
    cfg.log_config.hooks = [
        dict(type="TensorboardLoggerHook"),
        dict(
            type="MMSegWandbHook",
            init_kwargs=dict(project="test", mode="offline"),
            num_eval_images=5,
            log_checkpoint=True,
        ),
    ]
    with SegmentorEngine(
        cfg, ROOT / "ds_configs/zero3_bf16.json", work_dir=work_dir, resume=resume
    ) as engine:
        engine.train()
    wandb.teardown()  # the process is forked, and ends without what Python does at its end


def test_a_run_that_was_interrupted_goes_on_in_its_trackers(ade20k, tmp_path):
    spawn(train, 1, ade20k, tmp_path, None)
    # as one that was killed between steps 3 and 4
    shutil.rmtree(tmp_path / "checkpoints" / "iter_4")
    (tmp_path / "checkpoints" / "latest").write_text("iter_2")
    spawn(train, 1, ade20k, tmp_path, "auto")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    scores = {record["step"]: record["mIoU"] for record in records if "mIoU" in record}

    first, second = wandb_files(tmp_path)
    (manifest,) = [read_manifest(tmp_path / "checkpoints" / "iter_4")]
    assert first.id == second.id == manifest["run"]
    for file, steps in ((first, [1, 2, 3, 4]), (second, [3, 4])):
        rows = {row: values for row, values in file.rows}
        assert list(rows) == steps and all(values["step"] == row for row, values in rows.items())
        # exactly resumed, so that what is there twice is there twice the same
        assert {row: values["loss"] for row, values in rows.items()} == {step: losses[step] for step in steps}
        scored = [step for step in steps if step % 2 == 0]
        assert {row: v["mIoU"] for row, v in rows.items() if "mIoU" in v} == {s: scores[s] for s in scored}
        assert all(rows[step]["evaluation/classes/nrows"] == 150 for step in scored)
        assert all(rows[step]["evaluation/pictures/count"] == 5 for step in scored)
        assert [a.metadata for a in file.artifacts if a.type == "model"] != []
        assert file.config["ds_config"]["zero_optimization"]["stage"] == 3
        assert file.config["optimizer"]["type"] == "AdamW" and "internseg_ds" in file.config["environment"][0]
    best = max(scores, key=scores.get)
    assert (second.summary["best/step"], second.summary["best/mIoU"]) == (best, scores[best])

    events = read(tmp_path / "tensorboard")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("mIoU")] == [2, 4]
    assert sum(tag.startswith("validation/") for tag in events.Tags()["images"]) == 4


@pytest.mark.slow
def test_a_run_of_another_work_directory_is_another_one(ade20k, tmp_path, monkeypatch):
    """The first may go on training beside it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    spawn(train, 1, ade20k, tmp_path / "first", None)
    spawn(train, 1, ade20k, tmp_path / "second", tmp_path / "first" / "checkpoints" / "iter_2")
    (first,), (second,) = wandb_files(tmp_path / "first"), wandb_files(tmp_path / "second")
    assert first.id != second.id
    assert [row for row, _ in second.rows] == [3, 4]
