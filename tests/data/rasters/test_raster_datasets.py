"""Data sets of rasters: windows against crops of the whole image, tiles against the whole label map, and what the
checks of a start say."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.image_files import picture
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.data.loading import PositionSeeded
from internseg_ds.data.rasters.loading import LoadRaster
from internseg_ds.data.rasters.looks import channel_moments
from internseg_ds.data.samples import sample
from internseg_ds.data_report.contact_sheet import contact_sheet
from internseg_ds.data_report.doctor import examine
from internseg_ds.errors import ConfigError, DataError
from tests.data.rasters.test_raster_files import written
from tests.training.test_rasters import experiment

TILED = dict(tiled=True, blockxsize=32, blockysize=32, compress="deflate")
BUNDLE = [dict(type="DefaultFormatBundle"), dict(type="Collect", keys=["img", "gt_semantic_seg"])]
FLIP = dict(type="RandomFlip", prob=0.0)  # Collect wants to know of it
WINDOW = dict(type="LoadRasterWindow", crop_size=(40, 48))


def normalize(channels, **arguments):
    return dict(type="Normalize", mean=[0.0] * channels, std=[1.0] * channels, to_rgb=False) | arguments


def steps(loader, *more, channels=5):
    return [loader, dict(type="LoadAnnotations"), *more, FLIP, normalize(channels), *BUNDLE]


@pytest.fixture
def scene(tmp_path):
    """A scene whose first two channels are row and column of each pixel, and a label map that says them too."""
    rows, columns = np.mgrid[:100, :130]
    image = np.stack([rows, columns, rows * 500, columns * 400, rows + columns], -1).astype(np.uint16)
    labels = ((rows // 7 + columns // 5) % 3).astype(np.uint8)
    written(tmp_path / "north/a.tif", image, **TILED)
    written(tmp_path / "north/a_mask.tif", labels[..., None], **TILED)
    return tmp_path, image, labels


def built(root, pipeline, **arguments):
    entry = dict(type="FolderDataset", root=str(root), images="**/*.tif", masks="**/*_mask.tif")
    entry |= dict(classes=["road", "car", "tree"], pipeline=pipeline) | arguments
    test_mode = {"test_mode": True} if entry.pop("test_mode", False) else {}
    return build_datasets(entry, "data.train", **test_mode)


def custom(root, pipeline):
    entry = dict(
        type="CustomDataset", data_root=str(root), img_dir="north", img_suffix="a.tif", ann_dir="north"
    )
    return build_datasets(
        dict(entry, seg_map_suffix="a_mask.tif", classes=["road", "car", "tree"], pipeline=pipeline),
        "data.train",
    )


@pytest.mark.parametrize("build", [built, custom])
def test_a_drawn_window_is_a_crop_of_image_and_label_map_and_follows_from_the_seed(build, scene):
    root, image, labels = scene
    dataset, places = PositionSeeded(build(root, steps(WINDOW)), seed=3), set()
    for position in range(8):
        found = dataset[position, 0]
        values = found["img"].data.numpy().transpose(1, 2, 0)
        row, column = values[0, 0, :2].astype(int)
        places.add((row, column))
        crop = np.s_[row : row + 40, column : column + 48]
        np.testing.assert_array_equal(values, image[crop].astype(np.float32))
        np.testing.assert_array_equal(found["gt_semantic_seg"].data[0].numpy(), labels[crop])
        again = dataset[position, 0]
        assert again["img"].data.equal(found["img"].data)
    assert len(places) == 8


def test_windows_reach_every_border_of_a_scene(scene):
    root, _, _ = scene
    loader = built(root, steps(WINDOW)).pipeline.transforms[0]
    np.random.seed(0)
    windows = [loader.window_of((44, 50)) for _ in range(200)]
    assert {window.row for window in windows} == set(range(5))
    assert {window.column for window in windows} == set(range(3))


def test_a_scene_smaller_than_the_window_is_read_whole_and_padded_by_pad(scene):
    root, image, _ = scene
    pad = dict(type="Pad", size=(160, 160), pad_val=0, seg_pad_val=255)
    found = sample(built(root, steps(dict(WINDOW, crop_size=(160, 160)), pad)), 0)
    np.testing.assert_array_equal(
        found["img"].data[:, :100, :130], image.transpose(2, 0, 1).astype(np.float32)
    )
    assert found["gt_semantic_seg"].data.shape == (1, 160, 160) and not found["img"].data[:, 100:].any()
    assert (found["gt_semantic_seg"].data[0, 100:] == 255).all()


def test_tiles_cover_a_scene_once_with_their_ground_truth(scene):
    root, _, labels = scene
    dataset = built(root, [dict(type="LoadRaster", tile=(48, 64)), *steps({})[1:]], test_mode=True)
    dataset.pipeline.transforms.pop(2)  # evaluations load no label maps
    covered, truth = np.zeros((100, 130), int), np.full((100, 130), 9)
    for index, info in enumerate(dataset.img_infos):
        window = info["raster_window"]
        part = np.s_[window.row : window.row + window.height, window.column : window.column + window.width]
        covered[part] += 1
        truth[part] = ground_truth(dataset, index)
        assert picture(dataset, index).shape == (window.height, window.width, 3)
    assert len(dataset) == 9 and (covered == 1).all()
    np.testing.assert_array_equal(truth, labels)


def test_channels_are_chosen_and_what_the_file_has_no_data_for_becomes_a_number(tmp_path):
    image = np.arange(4 * 4 * 3, dtype=np.float32).reshape(4, 4, 3)
    image[0, 0] = -9999
    image[1, 1, 2] = np.nan
    image[2, 2] = np.inf
    written(tmp_path / "a.tif", image, nodata=-9999)
    written(tmp_path / "a_mask.tif", np.zeros((4, 4, 1), np.uint8))
    loader = dict(type="LoadRaster", channels=[3, 1], nodata=7)
    found = sample(built(tmp_path, steps(loader, channels=2)), 0)["img"].data.numpy()
    expected = image[..., [2, 0]].copy()
    expected[0, 0] = expected[1, 1, 0] = expected[2, 2] = 7
    np.testing.assert_array_equal(found.transpose(1, 2, 0), expected)


@pytest.mark.parametrize("nodata", ["a", None, True, float("nan")])
def test_what_stands_for_no_data_is_a_number(nodata):
    with pytest.raises(ConfigError, match=r"nodata=.* of LoadRaster must be a number"):
        LoadRaster(nodata=nodata)


@pytest.mark.parametrize(
    ("values", "type_", "coding"),
    [
        ([0, 300, 2], np.uint16, dict(label_map={0: "road", 300: "car", 2: None})),
        ([(9, 9, 9), (200, 0, 0), (0, 0, 0)], np.uint8, dict(colours=[(9, 9, 9), (200, 0, 0), (0, 0, 0)])),
    ],
)
def test_coded_label_maps_are_read_by_window_too(tmp_path, values, type_, coding):
    classes = np.random.default_rng(0).integers(0, 3, (64, 80))
    written(tmp_path / "a.tif", np.mgrid[:64, :80].transpose(1, 2, 0).astype(np.uint8))
    written(tmp_path / "a_mask.tif", np.array(values, type_)[classes].reshape(64, 80, -1))
    dataset = built(tmp_path, steps(WINDOW, channels=2), **coding)
    found = sample(dataset, 0)
    row, column = found["img"].data[:, 0, 0].int().tolist()
    expected = classes[row : row + 40, column : column + 48]
    if "label_map" in coding:
        expected = np.where(expected == 2, 255, expected)
    np.testing.assert_array_equal(found["gt_semantic_seg"].data[0], expected)


def test_rasters_of_colours_are_shown_as_their_channels_are_called(tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[..., 0], image[..., 1] = 250, 40  # infrared, red
    path = written(tmp_path / "a.tif", image)
    written(tmp_path / "a_mask.tif", np.zeros((8, 8, 1), np.uint8))
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [getattr(ColorInterp, name) for name in ("undefined", "red", "green", "blue")]
    assert picture(built(tmp_path, steps(dict(type="LoadRaster"), channels=4)), 0)[0, 0].tolist() == [
        0,
        0,
        40,
    ]


def refused(root, pipeline, message, error=ConfigError):
    with pytest.raises(error, match=message):
        sample(built(root, pipeline), 0)


def test_what_cannot_be_meant_of_rasters_is_one_sentence(scene):
    root, _, _ = scene
    colours = dict(type="PhotoMetricDistortion")
    refused(root, steps(WINDOW, colours), "PhotoMetricDistortion, which is of 8-bit images of three channels")
    to_rgb = [WINDOW, dict(type="LoadAnnotations"), normalize(5, to_rgb=True), *BUNDLE]
    refused(root, to_rgb, "LoadRasterWindow keeps the channels of a file in their order; write to_rgb=False")
    chosen = dict(WINDOW, channels=[1, 2, 3])
    refused(
        root, steps(chosen, colours, channels=3), r"a\.tif has 3 channels of uint16, and Photo", DataError
    )
    refused(root, steps(dict(WINDOW, channels=[6])), r"a\.tif has 5 channels, and channels=\[6\]", DataError)
    refused(
        root, steps(dict(WINDOW, crop_size=40)), r"crop_size=40 of LoadRasterWindow must be \(height, width\)"
    )
    refused(
        root, steps(dict(type="LoadRaster", channels=[0])), r"channels=\[0\] of LoadRaster must be numbers"
    )
    short = [WINDOW, dict(type="LoadAnnotations"), normalize(5, std=[1.0] * 4), *BUNDLE]
    refused(root, short, "5 numbers in mean and 4 in std")


def test_photometric_distortion_of_rasters_in_8_bit_colour_stays_allowed(tmp_path):
    written(tmp_path / "a.tif", np.full((64, 64, 3), 90, np.uint8))
    written(tmp_path / "a_mask.tif", np.zeros((64, 64, 1), np.uint8))
    assert sample(built(tmp_path, steps(WINDOW, dict(type="PhotoMetricDistortion"), channels=3)), 0)


def test_more_channels_than_normalize_has_numbers_for_are_named_for_mmsegs_loader_too(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((64, 64, 4), 900, np.uint16))
    written(tmp_path / "a_mask.tif", np.zeros((64, 64, 1), np.uint8))
    unchanged = dict(type="LoadImageFromFile", color_type="unchanged")
    refused(
        tmp_path, steps(unchanged, channels=3), r"a\.tif has 4 channels of uint16, and Normalize", DataError
    )


def test_a_label_map_of_other_sides_than_its_scene_is_named(scene):
    root, _, labels = scene
    written(root / "north/a_mask.tif", labels[:90, :, None])
    refused(root, steps(WINDOW), r"a_mask\.tif has 90 x 130 pixels and its image 100 x 130", DataError)
    with pytest.raises(DataError, match="90 x 130 pixels and its image"):
        survey(built(root, steps(WINDOW)), "data.train", training=True)


def test_a_first_look_at_large_scenes_takes_some_windows_and_claims_no_more(tmp_path):
    written(tmp_path / "a.tif", np.zeros((4096, 4096, 1), np.uint8), **TILED)
    written(tmp_path / "a_mask.tif", np.zeros((4096, 4096, 1), np.uint8), **TILED)
    (warning,) = survey(built(tmp_path, steps(WINDOW, channels=1)), "data.train", training=True)
    assert "occur in none of some windows of the 1 (of 1) label maps looked at: car, tree" in warning


def test_rasters_of_other_channels_or_types_than_the_rest_are_found_by_a_first_look(scene):
    root, image, labels = scene
    written(root / "b.tif", image[..., :4].astype(np.float32))
    written(root / "b_mask.tif", labels[..., None])
    warnings = survey(built(root, steps(WINDOW)), "data.train", training=True)
    assert any("1 raster has other channels" in line and "b.tif has 4 channels" in line for line in warnings)
    assert any("different types" in line for line in warnings)


def test_the_data_doctor_measures_each_channel_and_shows_windows(scene, tmp_path):
    root, image, labels = scene
    cfg = experiment(root)
    for name in ("train", "val", "test"):
        cfg.data[name].images, cfg.data[name].masks = "**/*.tif", "**/*_mask.tif"
    report = examine(read_experiment(cfg), workers=0)
    assert not report.wrong, report.wrong
    (look,) = report.scanned["data.train"].looks
    np.testing.assert_allclose(look.mean, image.reshape(-1, 5).mean(0))
    np.testing.assert_allclose(look.variance, image.reshape(-1, 5).var(0))
    counts = report.scanned["data.train"].labels.pixels
    assert [counts[index] for index in range(3)] == np.bincount(labels.ravel()).tolist()
    assert any("stands in data.train too" in finding.text for finding in report.odd)
    (shown,) = contact_sheet(report.datasets["data.train"], 1)
    assert shown.disk is not None and shown.network is not None, shown.fault
    loader = report.datasets["data.train"].pipeline.transforms[0]
    assert channel_moments(str(root / "north/a.tif"), loader, None)[0] == image[..., 0].size


BOUNDED = """
import json, re, sys
from pathlib import Path
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.samples import sample

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

dataset = build_datasets(json.loads(sys.argv[1]), "data.train")
before = peak()
for _ in range(4):
    assert sample(dataset, 0)["img"].data.shape == (4, 512, 512)
survey(dataset, "data.train", training=True)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_scene(tmp_path):
    """A scene of 8,000 x 8,000 x 4 of 16 bits: 512 MB, and a label map of 64 MB."""
    tiled = dict(driver="GTiff", height=8000, width=8000, tiled=True, sparse_ok=True, compress="deflate")
    values = np.random.default_rng(0).integers(0, 9_999, (4, 256, 256)).astype(np.uint16)
    for name, count, dtype in (("a", 4, "uint16"), ("a_mask", 1, "uint8")):
        with rasterio.open(tmp_path / f"{name}.tif", "w", count=count, dtype=dtype, **tiled) as file:
            for row in range(0, 7680, 1280):
                for column in range(0, 7680, 1280):
                    part = values[:count] if dtype == "uint16" else (values[:1] % 3).astype(np.uint8)
                    file.write(part, window=((row, row + 256), (column, column + 256)))
    entry = dict(
        type="FolderDataset", root=str(tmp_path), images="*.tif", masks="*_mask.tif", classes=["a", "b", "c"]
    )
    entry["pipeline"] = steps(dict(type="LoadRasterWindow", crop_size=(512, 512)), channels=4)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOUNDED, json.dumps(entry)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) < 128 * 2**20


def placed(path, *, shift=0.0, epsg=32633):
    """Says where a raster lies, in pixels of 10 m."""
    with rasterio.open(path, "r+") as dataset:
        dataset.crs = rasterio.CRS.from_epsg(epsg)
        dataset.transform = rasterio.transform.from_origin(500_000 + 10 * shift, 4_000_000, 10, 10)


@pytest.mark.parametrize("moved", [dict(shift=30), dict(epsg=32634)])
def test_a_label_map_of_another_place_than_its_scene_is_odd(scene, moved):
    root, *_ = scene
    for name in ("a", "a_mask"):
        placed(root / f"north/{name}.tif", shift=0.4 * (name == "a_mask"))
    dataset = built(root, steps(WINDOW))
    assert not [line for line in survey(dataset, "data.train", training=True) if "Earth" in line]
    placed(root / "north/a_mask.tif", **moved)
    (line,) = (line for line in survey(dataset, "data.train", training=True) if "Earth" in line)
    assert f"{root}/north/a_mask.tif" in line
    assert ("30 pixels" in line) == ("shift" in moved)


def test_a_number_for_no_data_that_the_type_lacks_is_named(tmp_path):
    written(tmp_path / "a.tif", np.full((4, 4, 1), 9, np.uint16), nodata=9)
    read = LoadRaster(nodata=-1)
    with pytest.raises(DataError, match=r"a\.tif has values of uint16, of which nodata=-1"):
        read({"img_info": {"filename": str(tmp_path / "a.tif")}})


def test_the_data_doctor_says_what_a_start_says_of_channels(scene):
    root, image, labels = scene
    written(root / "north/b.tif", image[..., :3], **TILED)
    written(root / "north/b_mask.tif", labels[..., None], **TILED)
    cfg = experiment(root)
    for name in ("train", "val", "test"):
        cfg.data[name].images, cfg.data[name].masks = "**/*.tif", "**/*_mask.tif"
    report = examine(read_experiment(cfg), workers=0)
    (said, _) = (finding.text for finding in report.odd if finding.name == "raster-channels")
    assert "data.train: 1 raster has other channels" in said and f"{root}/north/b.tif has 3 channels" in said


def test_a_nodata_value_of_label_rasters_that_is_a_class_is_said_once_a_file(scene):
    root, _, labels = scene
    written(root / "north/a_mask.tif", labels[..., None], **TILED, nodata=0)
    loader = dict(type="LoadRaster", tile=(50, 50))
    for dataset in (built(root, steps(WINDOW)), built(root, steps(loader), test_mode=True)):
        training = not dataset.test_mode
        said = [each for each in survey(dataset, "data.train", training=training) if "nodata value" in each]
        assert len(said) == 1 and "of 1 label map " in said[0] and "as road there" in said[0], said
    coded = built(root, steps(WINDOW), label_map={0: "road", 1: "car", 2: "tree"})  # which says what is meant
    assert not [each for each in survey(coded, "data.train", training=True) if "nodata value" in each]
