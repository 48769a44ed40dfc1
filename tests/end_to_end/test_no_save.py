import shutil

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import Platform
from internseg_ds.planning.memory_warnings import no_room_to_save
from tests.conftest import ROOT, TINY
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment


def test_a_run_that_saves_nothing_trains_and_scores_and_says_so(train):
    run = train(
        "--no-save",
        options=[
            "runner.max_iters=4",
            "checkpoint_config.interval=2",
            "evaluation.interval=4",
            "evaluation.save_best=mIoU",
        ],
    )
    assert sorted(run.losses) == [1, 2, 3, 4] and sorted(run.scores) == [4]
    assert not list((run.work_dir / "checkpoints").glob("*"))
    assert "this run saves no checkpoint" in run.output
    assert (run.work_dir / "evaluation" / "results.json").exists()


def stops_without_a_save(root, work_dir) -> None:
    from internseg_ds import SegmentorEngine

    with SegmentorEngine(
        small_experiment(root, "runner.max_iters=9"),
        ROOT / "ds_configs/zero3_bf16.json",
        work_dir=work_dir,
        validate=False,
        saves=False,
    ) as engine:
        engine.watch.ask_to_stop()
        engine.train()
        assert engine.stopped and engine.state.step < 9 and not list((work_dir / "checkpoints").glob("*"))


def test_a_request_to_stop_is_answered_without_a_save(ade20k, tmp_path):
    spawn(stops_without_a_save, 1, ade20k, tmp_path / "run")


def test_a_disk_without_room_for_a_checkpoint_is_a_warning_with_the_figures(tmp_path, monkeypatch):
    estimator = Estimator(read_experiment(ROOT / TINY, {"engine.global_batch": None}))
    ds, _ = estimator.resolve(ROOT / "ds_configs/zero1_bf16.json", World().size)
    assert no_room_to_save(estimator, ds, tmp_path / "not" / "there") is None
    needed = estimator.training_memory(ds, Platform(2.0**40)).checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, needed - 1))
    assert "each takes 0.0 GiB" in no_room_to_save(estimator, ds, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, needed))
    assert no_room_to_save(estimator, ds, tmp_path) is None
