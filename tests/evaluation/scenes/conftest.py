"""A model of a few thousand parameters with its config, and scenes that it segments."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from mmcv import Config

import internseg_ds.models  # noqa: F401 - registers the backbone
from internseg_ds import Segmenter
from tests.conftest import ROOT, TINY
from tests.evaluation.conftest import with_sized_weights, written

CLASSES = 5
CROP, STRIDE = (56, 56), (42, 35)
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=None,
        img_ratios=[1.0],
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="RandomFlip"),
            dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
            dict(type="Pad", size_divisor=14),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]


def write_weights(folder: Path, *, settings: dict[str, object] | None = None, **options: object) -> Path:
    """A .pth with the config of the demo at width 32, with windows of CROP every STRIDE pixels, and that config beside
    it as config.py. settings: of the config; options: of the decode head."""
    cfg = Config.fromfile(ROOT / TINY)
    cfg.merge_from_dict(
        {
            "model.backbone.embed_dim": 32,
            "model.backbone.num_heads": 2,
            "model.decode_head.in_channels": [32] * 4,
            "model.decode_head.channels": 16,
            "model.decode_head.num_classes": CLASSES,
            "model.auxiliary_head": None,
            "model.test_cfg.crop_size": CROP,
            "model.test_cfg.stride": STRIDE,
            "engine.backbone_dtype": "float32",
            "data.test.pipeline": PIPELINE,
            **(settings or {}),
            **{f"model.decode_head.{key}": value for key, value in options.items()},
        }
    )
    return written(with_sized_weights(cfg), cfg, folder)


@pytest.fixture(scope="package")
def weights(tmp_path_factory) -> Path:
    """Of CLASSES classes."""
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="package")
def segmenter(weights) -> Segmenter:
    return Segmenter.from_pretrained(weights, device="cpu")


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(channels, height, width) uint8: blobs, so that regions are larger than pixels."""
    coarse = torch.rand(1, channels, height // 12 + 2, width // 12 + 2, generator=torch.manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return (smooth.clamp(0, 1) * 255).byte().numpy()


def write_scene(path: Path, values: np.ndarray, **profile: object) -> Path:
    """values: (channels, h, w)."""
    channels, height, width = values.shape
    made = {"driver": "GTiff", "dtype": values.dtype.name, **profile}
    with rasterio.open(path, "w", count=channels, height=height, width=width, **made) as file:
        file.write(values)
    return path


UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0.0, 399_000.0, 0.0, -0.5, 5_800_000.0)}
