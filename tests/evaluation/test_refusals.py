"""What a refused evaluation or prediction leaves behind: nothing."""

import pytest
from PIL import Image

from internseg_ds.data.datasets import build_datasets
from internseg_ds.errors import CheckpointError, ConfigError
from internseg_ds.evaluation.predict import predict_files
from internseg_ds.evaluation.test import check_format, write_submission
from internseg_ds.evaluation.test import test as evaluate
from tests.conftest import ROOT, TINY


@pytest.mark.parametrize("command", ["test", "format-only", "predict"])
def test_no_folder_is_made_for_results_that_never_come(command, ade20k, tmp_path):
    options = {f"data.{split}.data_root": str(ade20k) for split in ("train", "val", "test")}
    config, missing, out = ROOT / TINY, tmp_path / "missing.pth", tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"missing\.pth"):
        if command == "test":
            evaluate(config, missing, out=out, show_dir=tmp_path / "shown", cfg_options=options)
        elif command == "format-only":
            write_submission(config, missing, out, cfg_options=options)
        else:
            predict_files(config, missing, [ade20k / "images" / "validation"], out, cfg_options=options)
    assert not list(tmp_path.iterdir())


def test_submission_files_are_not_of_parts_of_scenes(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "images/a.png")
    entry = dict(type="LoveDADataset", data_root=str(tmp_path), img_dir="images")

    def tiled(side):
        return build_datasets(
            dict(entry, pipeline=[dict(type="LoadRaster", tile=(side, side))]), "data.test", test_mode=True
        )

    with pytest.raises(ConfigError, match=r"tile of LoadRaster.*predict\.py --scenes"):
        check_format(tiled(16))
    check_format(tiled(32))  # of which each is a whole one
