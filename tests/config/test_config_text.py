"""A run's config is written as one file that mmcv reads back as it was, at once, whatever the config
holds."""

import time
from pathlib import Path

import mmseg
import pytest
from mmcv import Config

from internseg_ds.config.config_text import config_text
from internseg_ds.config.experiment import read_experiment
from tests.conftest import ROOT, TINY

ZOO = Path(mmseg.__file__).parent / ".mim/configs"
ODD = f"""
_base_ = "{ROOT / TINY}"
import functools
import numpy as np
from functools import partial
from pathlib import Path as Folder

class Mine:
    pass

twice = lambda number: 2 * number
own = dict(
    array=np.array([1.5, 2.0], dtype=np.float32), number=np.int64(3), infinite=float("inf"),
    function=lambda number: number, type=Mine, made=Mine(), known=partial, folder=Folder("a/b"),
    text="it's\\n'quoted' in \\"two\\" ways", nothing=(), alone=(1,), several={{1, 2}}, none=set(),
    **{{"not a name": 1, "class": 2}})
data = dict(train=dict(palette=np.zeros((150, 3), dtype=np.uint8)))
"""


def written(cfg: Config, path: Path) -> Config:
    path.write_text(config_text(cfg._cfg_dict.to_dict()))
    return Config.fromfile(path)


@pytest.mark.parametrize("folder", [ROOT / "configs", pytest.param(ZOO, marks=pytest.mark.slow)])
def test_it_reads_back_as_an_equal_config(folder, tmp_path):
    for path in folder.rglob("*.py"):
        if "_base_" in path.parts:  # parts of the others
            continue
        cfg = Config.fromfile(path, import_custom_modules=False)
        assert repr(written(cfg, tmp_path / "config.py")._cfg_dict) == repr(cfg._cfg_dict), path


def test_what_is_no_literal_is_written_as_code_or_named(tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    cfg = Config.fromfile(tmp_path / "odd.py")
    read = written(cfg, tmp_path / "config.py")
    assert (
        read.own.array.tolist() == [1.5, 2.0]
        and read.own.array.dtype == "float32"
        and read.own.known is cfg.own.known
    )
    for key in ("number", "infinite", "text", "nothing", "alone", "several", "none", "not a name", "class"):
        assert read.own[key] == cfg.own[key], key
    assert read.own.folder == "a/b" and read.data.train.palette.shape == (150, 3)
    assert "lambda" in read.own.function and "Mine" in read.own.type and " at 0x" not in read.own.made
    assert (tmp_path / "config.py").read_text().count("# has no text") == 1
    assert read_experiment(tmp_path / "odd.py").max_steps == read_experiment(tmp_path / "config.py").max_steps


def test_many_classes_take_no_time():
    palette = [[number % 256, 7 * number % 256, 3] for number in range(1000)]
    began = time.perf_counter()
    text = config_text(
        {
            "data": {
                split: dict(palette=palette, classes=tuple(map(str, range(1000))))
                for split in ("train", "val", "test")
            }
        }
    )
    assert time.perf_counter() - began < 0.5
    assert max(map(len, text.splitlines())) <= 140
