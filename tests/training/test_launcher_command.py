"""The command that goes on with a training, made of the one that began it."""

import sys

import pytest

from internseg_ds.training.launcher import Launcher, resuming


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("torchrun train.py a.py", "torchrun train.py a.py --resume auto"),
        ("x train.py a.py --overwrite --seed 3", "x train.py a.py --seed 3 --resume auto"),
        ("x train.py --local_rank=0 a.py --resume iter_3 --seed 3", "x train.py a.py --seed 3 --resume auto"),
        (
            "x train.py a.py --resume=auto --cfg-options b=1",
            "x train.py a.py --cfg-options b=1 --resume auto",
        ),
    ],
)
def test_a_command_line_is_made_to_resume(given, expected):
    assert resuming(given.split()) == expected.split()


def test_a_training_that_python_started_has_no_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--overwrite"])
    assert Launcher().resume_command() == ""
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "my config.py", "--overwrite"])
    assert Launcher().resume_command().endswith("launch/train.py 'my config.py' --resume auto")
