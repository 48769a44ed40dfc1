"""What a refused evaluation or prediction leaves behind: nothing."""

import pytest

from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.predict import predict_files
from internseg_ds.evaluation.test import test as evaluate
from internseg_ds.evaluation.test import write_submission
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
