"""What a resumed run says otherwise than the one that saved: told setting by setting; classes that would mean
others are refused."""

from pathlib import Path

import pytest

from internseg_ds.config.config_text import config_text
from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import CheckpointError
from internseg_ds.training.resume.changed_settings import (
    LINES,
    changed_classes,
    changed_groups,
    changed_settings,
)
from tests.conftest import ROOT, TINY

PATH = Path("work_dirs/mine/checkpoints/iter_4")


def text(**options) -> str:
    return config_text(
        read_experiment(
            ROOT / TINY, {key.replace("__", "."): value for key, value in options.items()}
        ).cfg._cfg_dict.to_dict()
    )


def test_each_changed_setting_is_a_line():
    said = changed_settings(
        text(),
        text(
            optimizer__betas=(0.9, 0.95),
            runner__max_iters=7,
            data__train__data_root="elsewhere",
            log_config__interval=1,
            optimizer_config={"grad_clip": {"max_norm": 3.0}},
            data__workers_per_gpu=9,
        ),
    )
    assert any("optimizer.betas (0.9, 0.999) -> (0.9, 0.95)" in line for line in said), said
    assert any("runner.max_iters" in line and line.endswith("-> 7") for line in said)
    assert any("data.train.data_root" in line and line.endswith("-> 'elsewhere'") for line in said)
    assert any("optimizer_config.grad_clip" in line and "3.0" in line for line in said)
    assert len(said) == 4 and all(
        line.startswith("the checkpoint's run had another setting: ") for line in said
    )


def test_the_same_config_says_nothing():
    assert changed_settings(text(), text()) == [] and changed_settings(None, text()) == []
    assert (
        changed_settings("optimizer = dict(betas=[0.9, 0.95])", "optimizer = dict(betas=(0.9, 0.95))") == []
    )


def test_a_config_of_a_note_is_never_run(tmp_path):
    (said,) = changed_settings(
        f"runner = dict(max_iters=open({str(tmp_path / 'made')!r}, 'w'))", "runner = dict(max_iters=4)"
    )
    assert "runner.max_iters" in said and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "damaged",
    [
        5,
        "runner = dict(",
        "runner = " + "[" * 5000 + "]" * 5000,
        "runner = " + "-" * 100_000 + "1",
        "a" * 2**21,
        "x = '\0'",
        "runner = {[]: 1}",
        "runner = {1: 2, **{}}",
        "runner = {(1, 2): {}} | {}",
        ["runner"],
    ],
)
def test_a_damaged_config_costs_no_run(damaged):
    assert len(changed_settings(damaged, text())) <= LINES + 1


def test_each_change_of_a_rate_is_a_line():
    before = [
        {"names": ["a", "b"], "lr": 1e-4, "weight_decay": 0.05},
        {"names": ["c"], "lr": 1e-4, "weight_decay": 0.0},
    ]
    now = [
        {"names": ["a", "b"], "lr": 5e-5, "weight_decay": 0.05},
        {"names": ["c", "new"], "lr": 1e-4, "weight_decay": 0.0},
    ]
    new, line = changed_groups(before, now)
    assert (
        new.startswith("1 parameter stands")
        and "for a and 1 more: lr 0.0001 -> 5e-05, weight_decay 0.05 -> 0.05" in line
    )
    assert changed_groups(before, before) == [] == changed_groups(None, now)
    assert len(changed_groups([{"names": 5}], now)) == 1


def test_classes_that_moved_are_refused():
    with pytest.raises(
        CheckpointError,
        match=r"class 0.*'sky'.*'road'.*\(2 classes moved\).*--load-from",
    ):
        changed_classes(PATH, ["sky", "road", "tree"], ["road", "sky", "tree"])
    with pytest.raises(CheckpointError, match=r"3 classes.*data\.train.* 2"):
        changed_classes(PATH, ["sky", "road", "tree"], ["sky", "road"])


def test_a_class_with_another_name_is_a_line():
    (said,) = changed_classes(PATH, ["sky", "raod"], ("sky", "road"))
    assert "class 1: 'raod' -> 'road'" in said
    assert (
        changed_classes(PATH, ["sky", "road"], ("sky", "road")) == [] == changed_classes(PATH, None, ("sky",))
    )
