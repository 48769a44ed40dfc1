"""A work directory that holds a run: refused, gone on with, or set aside."""

import json

import pytest

from internseg_ds import SegmentorEngine
from internseg_ds.checkpoints.manifest import MANIFEST
from internseg_ds.errors import ConfigError
from internseg_ds.training.work_dir import check_unused
from tests.conftest import ROOT
from tests.small_experiment import small_experiment


def test_what_a_run_left_is_not_overwritten(tmp_path):
    check_unused(tmp_path / "none", None, overwrite=False, resumes=False)
    (tmp_path / "metrics.jsonl").touch()
    check_unused(tmp_path, None, overwrite=False, resumes=False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        ConfigError,
        match=r"metrics\.jsonl.*--resume auto.*--work-dir.*--overwrite",
    ):
        check_unused(tmp_path, None, overwrite=False, resumes=False)
    check_unused(tmp_path, None, overwrite=True, resumes=False)
    check_unused(tmp_path, None, overwrite=False, resumes=True)
    check_unused(tmp_path, tmp_path / "checkpoints/iter_3", overwrite=False, resumes=False)
    with pytest.raises(ConfigError, match="holds a run"):
        check_unused(tmp_path, tmp_path / "another/checkpoints/iter_3", overwrite=False, resumes=False)
    with pytest.raises(ConfigError, match=r"--overwrite .* --resume"):
        check_unused(tmp_path, None, overwrite=True, resumes=True)


def test_a_finished_run_is_gone_on_with_or_set_aside(ade20k, tmp_path):
    work_dir, settings = (
        tmp_path / "run",
        ("runner.max_iters=2", "checkpoint_config.interval=1", "checkpoint_config.max_keep_ckpts=1"),
    )

    def run(**how):
        with SegmentorEngine(
            small_experiment(ade20k, *settings),
            ROOT / "ds_configs/zero1_bf16.json",
            work_dir=work_dir,
            validate=False,
            **how,
        ) as engine:
            engine.train()
            return engine.state.run

    first = run()
    records = (work_dir / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"1 checkpoint, .*iter_2\b"):
        run()
    assert (work_dir / "metrics.jsonl").read_text() == records
    assert run(resume="auto") == first
    second = run(overwrite=True)
    assert second != first and (tmp_path / "run.old_1/metrics.jsonl").read_text() == records
    assert (
        json.loads((tmp_path / "run.old_1/checkpoints/iter_2/internseg_ds.json").read_text())["run"] == first
    )
    assert json.loads((work_dir / "checkpoints/iter_2/internseg_ds.json").read_text())["run"] == second
    run(overwrite=True)
    assert (tmp_path / "run.old_2/checkpoints/iter_2").is_dir()


def test_a_score_that_was_recorded_and_not_noted_is_made_again_and_stands_once(ade20k, tmp_path):
    """As where a run is killed between the two."""
    settings = ("runner.max_iters=2", "checkpoint_config.interval=1", "evaluation.interval=1")
    for resumes in range(3):
        with SegmentorEngine(
            small_experiment(ade20k, *settings),
            ROOT / "ds_configs/zero1_bf16.json",
            work_dir=tmp_path,
            resume="auto",
        ) as engine:
            engine.train()
        records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "loss" in record] == [1, 2], resumes
        assert [record["step"] for record in records if "mIoU" in record] == [1, 2], resumes
        note = tmp_path / "checkpoints/iter_2" / MANIFEST
        note.write_text(json.dumps(json.loads(note.read_text()) | {"metrics": {}}))
