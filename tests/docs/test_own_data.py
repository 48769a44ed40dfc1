"""The ten lines of docs/data.md for own data, as a user starts them."""

import re

import numpy as np
import pytest
from mmcv import DictAction
from PIL import Image

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data_report.doctor import examine
from tests.conftest import ROOT

SMALLER = [
    "model.backbone.embed_dim=32",
    "model.backbone.depth=4",
    "model.backbone.num_heads=2",
    "model.backbone.out_indices=[0,1,2,3]",
    "model.backbone.use_flash_attn=False",
    "model.backbone.pretrained=None",
    "model.decode_head.in_channels=[32,32,32,32]",
    "model.decode_head.channels=16",
    "model.auxiliary_head.in_channels=32",
    "model.auxiliary_head.channels=16",
    "optimizer.paramwise_cfg.num_layers=4",
]


@pytest.fixture
def config(tmp_path):
    """The page's config on two images of each split, in a file."""
    (text,) = re.findall(r"## Own data.*?```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 10
    data = tmp_path / "mine"
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (data / folder / split).mkdir(parents=True)
        mask = np.zeros((60, 80), np.uint8)
        mask[20:50, 10:70] = 255
        generator = np.random.default_rng(len(split))
        for index in range(2):
            image = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(image).save(data / f"images/{split}/{index}.tif")
            Image.fromarray(mask).save(data / f"masks/{split}/{index}_mask.png")
        (data / f"{split}.txt").write_text(f"{split}/0\n{split}/1\n")
    text = text.replace("../_base_", str(ROOT / "configs/_base_")).replace("data/mine", str(data))
    (tmp_path / "upernet.py").write_text(text)
    return tmp_path / "upernet.py"


def test_the_ten_lines_for_own_data_are_right(config):
    options = dict(option.split("=", 1) for option in SMALLER)
    options = {key: DictAction._parse_iterable(value) for key, value in options.items()}
    report = examine(read_experiment(config, options), workers=0)
    assert report.findings == [] and len(report.datasets["data.train"]) == 2
    assert list(report.datasets["data.train"].CLASSES) == ["background", "building"]
    assert report.scanned["data.train"].labels.pixels == {0: 6000, 1: 3600}


@pytest.mark.slow
def test_the_ten_lines_for_own_data_start(config, launch, tmp_path):
    options = ["--work-dir", tmp_path / "work", "--cfg-options", *SMALLER]
    done = launch("launch/train.py", config, "--dry-run", *options, processes=1)
    assert "one step of 2 images" in done.stdout and "ran in" in done.stdout
