"""Sizes that were changed in one place and not in another are named at the start."""

import re

from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.preflight.image_sizes import size_lines
from tests.conftest import ROOT, TINY


def test_a_crop_size_over_a_base_is_a_warning(tmp_path):
    (tmp_path / "larger.py").write_text(f"_base_ = {str(ROOT / TINY)!r}\ncrop_size = (224, 224)\n")
    (said,) = read_experiment(tmp_path / "larger.py").warnings
    assert "crop_size = (224, 224)" in said and "(there are (112, 112))" in said


def test_sizes_that_agree_are_one_line():
    experiment = read_experiment(ROOT / TINY)
    assert experiment.warnings == ()
    line, warnings = size_lines(experiment, (112, 112))
    sizes = r"training images.* 112 x 112,.* windows.* 112 x 112, stride 70 x 70, img_size.* 112 x 112"
    assert re.fullmatch(sizes, line) and not warnings


def test_a_test_window_of_another_size_than_the_crop_is_a_warning():
    experiment = read_experiment(Config.fromfile(ROOT / TINY))
    (said,) = size_lines(experiment, (224, 224))[1]
    assert re.search(r"training images.* 224 x 224 .*test windows 112 x 112", said)
    experiment.model.test_cfg = dict(mode="whole")
    assert not size_lines(experiment, (224, 224))[1]
