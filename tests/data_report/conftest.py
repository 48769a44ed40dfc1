"""Experiments on small data sets."""

import pytest
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from tests.conftest import ROOT, TINY


@pytest.fixture
def experiment(tmp_path):
    """experiment(train, val, classes): of a config file that has these data sets."""

    def read(train, val, classes=2):
        cfg = Config.fromfile(ROOT / TINY)
        cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = classes
        cfg.data.train, cfg.data.val, cfg.data.test = train, val, val
        cfg._cfg_dict.pop("test_pipeline")
        file = tmp_path / "experiment.py"
        file.write_text(cfg.pretty_text)
        return read_experiment(file)

    return read
