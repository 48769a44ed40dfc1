"""A model that tells classes apart without any training, and a `Segmenter` of it."""

from pathlib import Path

import pytest
import torch
from mmcv import Config
from mmcv.cnn.utils import revert_sync_batchnorm
from mmseg.models import build_segmentor
from torch import nn

import internseg_ds.models  # noqa: F401 - registers the backbone
from internseg_ds import Segmenter
from tests.conftest import ROOT, TINY

NARROW = {
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
    "model.decode_head.in_channels": [32] * 4,
    "model.decode_head.channels": 16,
    "model.auxiliary_head.in_channels": 32,
    "model.auxiliary_head.channels": 16,
}
"""The demo's segmentor at width 32."""


def with_sized_weights(cfg: Config) -> nn.Module:
    """Its segmentor, in evaluation mode, with weights of some size, so that predictions are not one class."""
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_segmentor(cfg.model))
    for param in model.parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, 0.0, 2 / param[0].numel() ** 0.5)
    return model.eval()


def written(model: nn.Module, cfg: Config, folder: Path) -> Path:
    """A .pth as launch/consolidate.py writes it, with this config, which lies beside it as config.py."""
    classes = cfg.model.decode_head.num_classes
    meta = {
        "CLASSES": [f"class {number}" for number in range(classes)],
        "PALETTE": [[number % 256, 255 - number % 256, 7] for number in range(classes)],
        "config": cfg.pretty_text,
    }
    path = folder / "segmentor.pth"
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
    path.with_name("config.py").write_text(cfg.pretty_text)
    return path


@pytest.fixture(scope="package")
def tiny():
    """The demo's segmentor at width 32."""
    cfg = Config.fromfile(ROOT / TINY)
    cfg.merge_from_dict(NARROW)
    return with_sized_weights(cfg)


@pytest.fixture(scope="package")
def weights(tiny, tmp_path_factory) -> Path:
    """A file of `tiny`, whose data are nowhere."""
    cfg = Config.fromfile(ROOT / TINY)
    cfg.merge_from_dict(NARROW | {"engine.backbone_dtype": "float32"})
    return written(tiny, cfg, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="package")
def segmenter(weights) -> Segmenter:
    return Segmenter.from_pretrained(weights, device="cpu")
