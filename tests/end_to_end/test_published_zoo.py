"""Config files of mmseg 0.30's package through every check before a run (what `train.py --dry-run` does), as
they stand but for where the data lie.

A file for each combination of segmentor, backbone, heads, losses, optimizer, schedule and kind of data set.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmseg
import numpy as np
import pytest
from mmcv import Config
from mmseg.datasets import CustomDataset, build_dataset
from PIL import Image

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import UserError
from internseg_ds.preflight.preflight import check
from tests.conftest import ROOT

ZOO = Path(mmseg.__file__).parent / ".mim/configs"


def kind(value: Any) -> Any:
    """The types in a config section, without sizes."""
    if isinstance(value, dict):
        return value.get("type"), *(
            kind(item) for _, item in sorted(value.items()) if isinstance(item, (dict, list, tuple))
        )
    return (
        tuple(kind(item) for item in value if isinstance(item, dict))
        if isinstance(value, (list, tuple))
        else None
    )


def one_of_each() -> Iterator[Path]:
    seen = set()
    for path in sorted(ZOO.glob("[!_]*/*.py")):
        cfg = Config.fromfile(str(path))
        if "model" not in cfg:
            continue
        train = next(leaf_datasets(cfg.data.train))
        found = (
            kind({**cfg.model, "neck": cfg.model.get("neck")}),
            cfg.optimizer.get("constructor"),
            cfg.lr_config.get("policy"),
            train.type,
        )
        if found not in seen:
            seen.add(found)
            yield path


def given_data(cfg: Config, folder: Path, made: dict[tuple, Path]) -> None:
    """Two random images for each kind of data set, and the data sections of `cfg` pointed at them; no
    pretrained weights."""
    for split in ("train", "val", "test"):
        for leaf in leaf_datasets(cfg.data.get(split, [])):
            bare = {**leaf, "img_dir": str(folder), "ann_dir": str(folder), "data_root": None}
            if "split" in leaf:
                (folder / "none.txt").touch()
                bare["split"] = str(folder / "none.txt")
            try:
                dataset = build_dataset(bare)
            except TypeError:  # of data sets that have images and label maps in one folder
                bare.pop("ann_dir")
                dataset = build_dataset(bare)
            root = folder_for(dataset, folder, made)
            leaf.data_root = str(root)
            for key, value in (
                ("img_dir", "images"),
                ("ann_dir", "labels"),
                *([("split", "names.txt")] if "split" in leaf else []),
            ):
                leaf[key] = [value] * len(leaf[key]) if isinstance(leaf.get(key), (list, tuple)) else value
    cfg.load_from = None
    for section in (cfg.model, cfg.model.get("backbone", {})):
        for key in ("pretrained", "init_cfg"):
            if section.get(key) is not None and (
                key == "pretrained" or section[key].get("type") == "Pretrained"
            ):
                section[key] = None
    # of a backbone around another one
    cfg.model.get("backbone", {}).get("backbone_cfg", {}).pop("init_cfg", None)


def folder_for(dataset: CustomDataset, folder: Path, made: dict[tuple, Path]) -> Path:
    what = (type(dataset).__name__, dataset.img_suffix, dataset.seg_map_suffix)
    if what not in made:
        root = made[what] = folder / f"data_{len(made)}"
        random = np.random.default_rng(0)
        for name in ("images", "labels"):
            (root / name).mkdir(parents=True)
        for index in range(2):
            labels = random.integers(0, len(dataset.CLASSES), (600, 700)) + dataset.reduce_zero_label
            Image.fromarray(random.integers(0, 255, (600, 700, 3)).astype(np.uint8)).save(
                root / f"images/{index}{dataset.img_suffix}"
            )
            name = (
                f"{index}_instance_color_RGB.png"
                if type(dataset).__name__ == "iSAIDDataset"
                else f"{index}{dataset.seg_map_suffix}"
            )
            Image.fromarray(labels.astype(np.uint8)).save(root / f"labels/{name}")
        (root / "names.txt").write_text("0\n1\n")
    return made[what]


@pytest.mark.slow
def test_every_kind_of_config_of_mmsegs_package_passes_the_checks(tmp_path):
    made, refused = {}, {}
    paths = list(one_of_each())
    assert len(paths) > 100
    for path in paths:
        cfg = Config.fromfile(str(path))
        if "test" not in cfg.data:
            cfg.data.test = cfg.data.val
        try:
            given_data(cfg, tmp_path, made)
            plan = check(read_experiment(cfg), ROOT / "ds_configs/zero3_bf16.json", World())
            # of data made for the test, which trains on what it validates on
            said = [warning for warning in plan.warnings if "are in data.train too" not in warning]
            assert not said, (path.name, said)
        except UserError as error:
            refused[path.name] = str(error)
    assert not refused, refused
