"""A run from Python goes where its config says, with its seed, and says what `auto_resume` came to."""

from pathlib import Path

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
    assert log.count(f"--resume auto: there is no checkpoint in {work_dir}/checkpoints yet") == 1
    assert log.count("of step 1, and runner.max_iters is 1") == 1
    assert log.count("seed 5, 1 process") == 2 and log.count("training images of 112 x 112") == 2


def test_work_dir_seed_and_auto_resume_of_a_config_are_the_runs(ade20k, tmp_path):
    spawn(the_same_run_twice, 1, ade20k, tmp_path / "run")
