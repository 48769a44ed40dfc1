"""Variables of a config that were set over a `_base_`, where its sections do not follow them."""

import pytest

from internseg_ds.config.experiment import read_experiment
from tests.conftest import ROOT, TINY

OTHER_NORM = "img_norm_cfg = dict(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0], to_rgb=True)\n"


def warnings_of(folder, text):
    (folder / "own.py").write_text(f"_base_ = {str(ROOT / TINY)!r}\n{text}")
    return read_experiment(folder / "own.py").warnings


def test_a_variable_that_no_section_has_is_a_warning(tmp_path):
    (said,) = warnings_of(tmp_path, OTHER_NORM)
    assert (
        said.startswith("img_norm_cfg = {'mean': [0.0, 0.0, 0.0], 'std': [1.0, 1.0, 1.0]")
        and "set over a _base_ (there {'mean': [123.675" in said
    )


@pytest.mark.parametrize(
    "text",
    [
        OTHER_NORM + 'data = dict(val=dict(pipeline=[dict(type="LoadImageFromFile"), dict(type="Normalize", '
        "**img_norm_cfg)]))",
        "data_root = 'somewhere'\ndata = dict(train=dict(data_root=data_root), "
        "val=dict(data_root=data_root), test=dict(data_root=data_root))",
        "of_its_own = 3",
        "size = 'tiny'\nmodel = dict(backbone=dict(depth={'tiny': 4}[size]))",
    ],
    ids=["used", "used in part", "new", "looked up"],
)
def test_a_variable_that_is_used_or_of_its_own_is_none(text, tmp_path):
    assert warnings_of(tmp_path, text) == ()
