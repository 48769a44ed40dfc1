"""`launch/check_data.py` as users start it: what it prints, and how it ends."""

import os
import re

import pytest

from internseg_ds import exit_codes
from tests.conftest import ROOT
from tests.data_report.small_data import TWO, entry, sound, write


@pytest.fixture
def given(experiment, tmp_path):
    return experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    ).path


def check(launch, *args, **options):
    return launch("launch/check_data.py", *args, "--workers", 1, processes=1, timeout=120, **options)


def test_sound_data_end_with_0_and_what_was_looked_at(launch, given, tmp_path):
    sound(tmp_path)
    done = check(launch, given, "--sample", 2, "--page", tmp_path / "page.html")
    assert done.returncode == 0 and "data.train: 2 of 3 images looked at" in done.stdout
    assert "<html" in (tmp_path / "page.html").read_text()
    said = done.stderr.splitlines()  # nothing of mmseg's or torch's
    assert "loading mmseg" in said[0] and all(re.match(r"\d\d:\d\d:\d\d ", line) for line in said)
    assert "Loaded" not in done.stderr


def test_wrong_data_end_with_2_and_one_message(launch, given, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 255], [255, 0]])
    done = check(launch, given, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
    assert "255 is meant to be car" in errors[0] and "wrong [masks-0-255]" in done.stdout
    done = check(launch, tmp_path / "nowhere.py", check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1


@pytest.mark.slow
def test_a_defect_of_a_data_set_of_ones_own_ends_with_1_and_its_traceback(launch, experiment, tmp_path):
    (tmp_path / "own_data.py").write_text(
        "from mmseg.datasets import DATASETS, CustomDataset\n\n\n"
        "@DATASETS.register_module()\n"
        "class OwnDataset(CustomDataset):\n"
        "    def __len__(self):\n"
        "        raise ZeroDivisionError('a defect')\n"
    )
    sound(tmp_path)
    entries = [entry("OwnDataset", tmp_path, split, **TWO) for split in ("train", "val")]
    config = tmp_path / "experiment.py"
    experiment(*entries)
    config.write_text(f"custom_imports = dict(imports=['own_data'])\n{config.read_text()}")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = check(launch, config, check=False, launcher="python", env={"PYTHONPATH": path})
    assert done.returncode == exit_codes.FAILED and "error: " not in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: a defect") and "in __len__" in done.stderr
