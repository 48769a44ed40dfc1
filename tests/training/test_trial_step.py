"""One real step of a dry run, in a process of its own."""

import re
from pathlib import Path

import pytest
import torch

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import ConfigError
from internseg_ds.preflight.preflight import Plan, check
from internseg_ds.training import trial_step
from internseg_ds.training.trial_step import try_step, why_untried
from tests.conftest import EOMT, MASK2FORMER, ROOT, TINY, data_options

BACKBONE = """
from mmseg.models import BACKBONES
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B

@BACKBONES.register_module()
class OverwritesWhatItsGradientNeeds(InternViT6B):
    def forward(self, x):
        first, *others = super().forward(x)
        kept = first.sigmoid()
        kept.add_(1)
        return [kept, *others]
"""


def planned(
    base: str, root: Path, folder: Path, text: str = "", *options: str
) -> tuple[Plan, dict[str, str]]:
    config = folder / "experiment.py"
    config.write_text(f"_base_ = {str(ROOT / base)!r}\n" + text)
    settings = dict(option.split("=", 1) for option in (*data_options(root), *options))
    return check(read_experiment(config, settings), ROOT / "ds_configs/zero3_bf16.json", World()), settings


def test_a_backward_that_fails_is_refused_though_every_shape_fits(ade20k, tmp_path, monkeypatch):
    (tmp_path / "backbones_of_the_test.py").write_text(BACKBONE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    plan, settings = planned(
        TINY,
        ade20k,
        tmp_path,
        'custom_imports = dict(imports=["backbones_of_the_test"])\n'
        'model = dict(backbone=dict(type="OverwritesWhatItsGradientNeeds"))\n',
    )
    with pytest.raises(
        ConfigError,
        match=r"zero3_bf16\.json: RuntimeError: .*inplace operation",
    ):
        try_step(plan, settings)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "side"), [(MASK2FORMER, 56), (EOMT, 48)])
def test_a_corner_of_larger_images_is_tried_with_its_masks(config, side, ade20k, tmp_path, monkeypatch):
    plan, settings = planned(config, ade20k, tmp_path)
    monkeypatch.setattr(trial_step, "_corner_side", lambda _: side)
    tried = rf"one step of 2 images of {side} x {side} pixels, .*ZeRO-3, .*window.*: ran in \d+ s"
    assert re.match(tried, try_step(plan, settings))


def test_a_model_beyond_this_machine_is_not_tried(ade20k, tmp_path, monkeypatch):
    plan, _ = planned(TINY, ade20k, tmp_path)
    assert why_untried(plan) is None
    monkeypatch.setattr(trial_step, "LARGEST", 1000)
    assert re.match(r"no step .*: [\d,]+ parameters", why_untried(plan) or "")


def test_maps_are_cut_and_other_tensors_are_not():
    image, boxes = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8), torch.zeros(4, 5)
    cut = trial_step._corner(
        {"img": image, "masks": [image[0]], "boxes": boxes, "metas": [{"name": "a"}]}, (8, 8), 4
    )
    assert torch.equal(cut["img"], image[..., :4, :4]) and torch.equal(cut["masks"][0], image[0, :, :4, :4])
    assert cut["boxes"] is boxes and cut["metas"] == [{"name": "a"}]
