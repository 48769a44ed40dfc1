"""A run from Python goes where its config says, with its seed, and says what `auto_resume` came to."""

import re
from pathlib import Path

import pytest

from internseg_ds.errors import CheckpointError
from internseg_ds.training.segmentor_engine import SegmentorEngine
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment


def the_same_run_twice(root: Path, work_dir: Path) -> None:
    cfg = small_experiment(
        root,
        "runner.max_iters=1",
        "checkpoint_config.interval=1",
        "auto_resume=True",
        "seed=5",
        f"work_dir={work_dir}",
    )
    for _ in range(2):
        with SegmentorEngine(cfg, ROOT / "ds_configs/zero3_bf16.json", validate=False) as engine:
            engine.train()
        assert (engine.state.step, engine.state.seed) == (1, 5)
    log = (work_dir / "train.log").read_text()
    assert len(re.findall(rf"--resume auto:.* {work_dir}/checkpoints\b", log)) == 1
    assert log.count("of step 1, and runner.max_iters is 1") == 1
    assert log.count("seed 5, 1 process") == 2 and log.count("training images of 112 x 112") == 2


def test_work_dir_seed_and_auto_resume_of_a_config_are_the_runs(ade20k, tmp_path):
    spawn(the_same_run_twice, 1, ade20k, tmp_path / "run")


def goes_on_with_another_batch(root: Path, work_dir: Path) -> None:
    cfg = small_experiment(
        root, "lr_config.warmup_iters=0", "lr_config.by_epoch=True", "checkpoint_config.interval=1"
    )
    cfg.runner = dict(type="EpochBasedRunner", max_epochs=1)
    zero3 = ROOT / "ds_configs/zero3_bf16.json"
    with SegmentorEngine(cfg, zero3, work_dir=work_dir, validate=False) as engine:
        steps = len(engine.plan.train_set) // cfg.engine.global_batch
        assert engine.plan.experiment.max_steps == steps
        engine.train()
        assert engine.state.step == steps
    cfg.runner.max_epochs = 2
    with SegmentorEngine(cfg, zero3, work_dir=work_dir, resume="auto", validate=False) as engine:
        engine.train()
        assert engine.state.step == 2 * steps
    cfg.engine.global_batch *= 2
    with pytest.raises(CheckpointError, match=rf"\b{steps} steps.* {steps // 2},"):
        SegmentorEngine(cfg, zero3, work_dir=work_dir, resume="auto", validate=False)


def test_epochs_of_another_length_are_not_gone_on_with(ade20k, tmp_path):
    spawn(goes_on_with_another_batch, 1, ade20k, tmp_path)


def compiled_while_layers_are_timed(root: Path, work_dir: Path) -> None:
    cfg = small_experiment(root, "runner.max_iters=2", "engine.compile=True", "lr_config.warmup_iters=0")
    with SegmentorEngine(
        cfg, ROOT / "ds_configs/zero3_bf16.json", work_dir=work_dir, validate=False
    ) as engine:
        engine.train()
    log = (work_dir / "train.log").read_text()
    assert "compile the backbone's blocks" in log and "cannot be compiled" not in log


@pytest.mark.slow
def test_blocks_are_compiled_in_a_run_whose_first_step_is_logged(ade20k, tmp_path):
    spawn(compiled_while_layers_are_timed, 1, ade20k, tmp_path)
