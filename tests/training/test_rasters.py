"""A whole run on rasters of five channels of 16 bits, from weights of three, on two processes under ZeRO-3."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv import Config
from timm.models._manipulate import adapt_input_conv

from internseg_ds import SegmentorEngine
from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_for_training
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.process_group import World
from internseg_ds.distributed.weight_loading import match_backbone
from internseg_ds.errors import ConfigError, DataError
from internseg_ds.evaluation.segmenter import Segmenter
from internseg_ds.preflight.preflight import check, survey_data
from tests.conftest import ROOT
from tests.data.rasters.test_raster_files import written
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import ds_config
from tests.small_experiment import small_experiment

CHANNELS, SIDE = 5, 168
ZERO3 = {"zero_optimization": {"stage": 3}}
NORMALIZE = dict(type="Normalize", mean=[5000.0] * CHANNELS, std=[2500.0] * CHANNELS, to_rgb=False)
TRAIN = [
    dict(type="LoadRasterWindow", crop_size=(112, 112)),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
    NORMALIZE,
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
]
INNER = [
    dict(type="Resize", keep_ratio=True),
    dict(type="RandomFlip"),
    NORMALIZE,
    dict(type="ImageToTensor", keys=["img"]),
    dict(type="Collect", keys=["img"]),
]
TEST = [
    dict(type="LoadRaster", tile=(112, 112)),
    dict(type="MultiScaleFlipAug", img_scale=None, img_ratios=[1.0], flip=False, transforms=INNER),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Two scenes of 168 x 200 pixels whose class shows in the last channel."""
    folder, generator = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for name in "ab":
        labels = generator.integers(0, 3, (SIDE // 8, 200 // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image = generator.integers(0, 10_000, (SIDE, 200, CHANNELS)).astype(np.uint16)
        image[..., -1] = 4_000 * labels.astype(np.uint16)
        tiled = dict(tiled=True, blockxsize=64, blockysize=64, compress="deflate")
        written(folder / f"{name}.tif", image, **tiled)
        written(folder / f"{name}_mask.tif", labels[..., None], **tiled)
    return folder


def experiment(scenes: Path, **backbone: object) -> Config:
    cfg = small_experiment(scenes)  # its data are replaced
    data = dict(
        type="FolderDataset", root=str(scenes), images="*.tif", masks="*_mask.tif", classes=["a", "b", "c"]
    )
    cfg.data = dict(samples_per_gpu=2, workers_per_gpu=0) | {
        "train": dict(data, pipeline=TRAIN),
        "val": dict(data, pipeline=TEST),
        "test": dict(data, pipeline=TEST),
    }
    cfg.model.backbone.in_chans = CHANNELS
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 3
    cfg.merge_from_dict({"runner.max_iters": 2, "evaluation.interval": 2, "engine.backbone_dtype": "float32"})
    cfg.model.backbone.update(backbone)
    return cfg


@pytest.fixture(scope="module")
def of_three(scenes, tmp_path_factory) -> Path:
    """Weights of a backbone for RGB."""
    model = experiment(scenes, in_chans=3).model
    built = build_for_training(model, ds_config(1, bf16=False), torch.device("cpu"), seed=7)
    path = tmp_path_factory.mktemp("weights") / "rgb.pth"
    torch.save(built.backbone.state_dict(), path)
    return path


def train(scenes: Path, weights: Path, work_dir: Path) -> None:
    cfg = experiment(scenes, pretrained=str(weights))
    with SegmentorEngine(cfg, ZERO3, work_dir=work_dir) as engine:
        kernel = engine.deepspeed.module.backbone.patch_embed.proj.weight
        assert kernel.numel() == 0  # really partitioned
        with gathered([kernel]):
            expected = adapt_input_conv(CHANNELS, torch.load(weights)["patch_embed.proj.weight"])
            torch.testing.assert_close(kernel.data, expected)
        engine.train()


@pytest.fixture(scope="module")
def trained(scenes, of_three, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("run")
    spawn(train, 2, scenes, of_three, work_dir)
    return work_dir


def test_a_run_of_five_channels_starts_from_weights_of_three_and_is_scored_by_windows(trained):
    log = next(trained.glob("*.log")).read_text()
    assert (
        "patch_embed.proj.weight from 3 image channels to 5: channel n is channel n modulo 3, times 3/5"
        in log
    )
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert any("mIoU" in record for record in records)


def test_its_weights_segment_scenes_and_arrays_of_five_channels(trained, scenes, tmp_path):
    consolidate(trained, tmp_path / "model.pth")
    segmenter = Segmenter.from_pretrained(tmp_path / "model.pth")
    of_file = segmenter(str(scenes / "a.tif"))
    assert of_file.labels.shape == (SIDE, 200) and of_file.picture.size == (200, SIDE)
    array = np.random.default_rng(0).integers(0, 9_000, (112, 112, CHANNELS)).astype(np.uint16)
    assert segmenter(array).labels.shape == (112, 112)
    with pytest.raises(
        DataError, match=r"image 0 has 4 channels of uint16, and Normalize has mean and std of 5"
    ):
        segmenter(array[..., :4])


def checked(cfg: Config):
    return survey_data(check(read_experiment(cfg), ZERO3, World(rank=0, size=1)))


def test_channels_that_the_backbone_does_not_take_are_one_error_with_file_and_setting(scenes):
    with pytest.raises(
        ConfigError,
        match=r"image .*a\.tif comes out of the pipeline of data\.train with 5 channels, and the backbone InternViT6B "
        r"takes 4 \(model\.backbone\.in_chans\); write 5 there",
    ):
        checked(experiment(scenes, in_chans=4))


def test_channels_that_normalize_has_no_numbers_for_are_one_error_with_file_and_setting(scenes):
    cfg = experiment(scenes)
    cfg.data.train.pipeline[3].mean = cfg.data.train.pipeline[3].std = [1.0] * 4
    with pytest.raises(
        DataError, match=r"image .*a\.tif has 5 channels of uint16, and Normalize has mean and std of 4"
    ):
        checked(cfg)


def test_rasters_pass_every_check_of_a_start(scenes):
    plan = checked(experiment(scenes))
    (warning,) = plan.warnings  # that the test trains on what it validates on
    assert warning.startswith("2 images of the 2 of data.val are in data.train too")
    assert len(plan.train_set) == 2 and len(plan.val_set) == 2 * 2 * 2


def test_the_base_config_of_rasters_can_be_built_upon():
    cfg = Config.fromfile(ROOT / "configs/_base_/datasets/rasters_512x512.py")
    assert (
        len(cfg.mean) == len(cfg.std) == 4 and cfg.data.train.dataset.pipeline[0].type == "LoadRasterWindow"
    )


def test_published_weights_and_other_channels_are_shown_by_a_dry_run(scenes, of_three):
    plan = check(
        read_experiment(experiment(scenes, pretrained=str(of_three))),
        ZERO3,
        World(rank=0, size=1),
    )
    assert "from 3 image channels to 5" in plan.weights.summary()
    assert match_backbone(plan.meta_model, plan.weights.weights).resized == ["patch_embed.proj.weight"]
