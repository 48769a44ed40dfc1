"""What cannot be segmented as a scene ends with one error that says what is wrong, and leaves nothing behind."""

import resource
import sys

import numpy as np
import pytest
import rasterio
from PIL import Image

from internseg_ds.errors import ConfigError, DataError, FaultError, OutputError
from internseg_ds.evaluation.scenes.predict import predict_scenes
from internseg_ds.evaluation.scenes.segmentation import SceneOptions
from tests.evaluation.scenes.conftest import UTM, pixels, write_scene


@pytest.fixture
def predict(weights, tmp_path):
    """predict(scenes, cfg_options): of files, into the folder out."""

    def call(*scenes, **cfg_options):
        options = {key.replace("__", "."): value for key, value in cfg_options.items()}
        return predict_scenes(
            weights.with_name("config.py"),
            weights,
            scenes,
            tmp_path / "out",
            options=SceneOptions(shapes=True),
            cfg_options=options,
        )

    return call


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "scene.tif", pixels(40, 50), **UTM)


def test_a_result_that_is_there_is_kept(predict, scene, tmp_path):
    for name in ("scene_labels.tif", "scene_shapes.geojson"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("of yesterday")
        with pytest.raises(OutputError, match=f"{name} exists already"):
            predict(scene)
        assert (tmp_path / "out" / name).read_text() == "of yesterday"
        (tmp_path / "out" / name).unlink()


def test_scenes_of_one_name_are_refused(predict, scene, tmp_path):
    other = write_scene(tmp_path / "scene.png", pixels(40, 50), driver="PNG")
    with pytest.raises(DataError, match=r"2 scenes would be written to .*scene_labels\.tif"):
        predict(scene, other)


@pytest.mark.parametrize(
    ("channels", "dtype", "message"),
    [
        (2, np.uint8, "2 channels of uint8, and this model was trained on 8-bit images in colour"),
        (7, np.uint8, "7 channels of uint8"),
        (3, np.uint16, "3 channels of uint16"),
    ],
)
def test_other_channels_than_those_of_the_model_are_named(predict, tmp_path, channels, dtype, message):
    scene = write_scene(tmp_path / "scene.tif", pixels(40, 50, channels).astype(dtype))
    with pytest.raises(DataError, match=message):
        predict(scene)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_raster_is_named(predict, scene, tmp_path):
    (tmp_path / "bad.tif").write_bytes(b"no raster")
    with pytest.raises(DataError, match=r"bad\.tif cannot be read"):
        predict(scene, tmp_path / "bad.tif")
    assert not (tmp_path / "out").exists()


def test_a_scene_that_is_damaged_further_in_leaves_no_label_map(predict, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 300, 60), dtype=np.uint8)
    scene = write_scene(tmp_path / "scene.tif", noise, compress="deflate", blockysize=16)
    data = scene.read_bytes()
    with rasterio.open(scene) as file:
        assert file.block_shapes[0][0] == 16
    middle = len(data) // 2
    scene.write_bytes(data[:middle] + bytes(3000) + data[middle + 3000 :])
    with pytest.raises(FaultError, match=r"scene\.tif cannot be read"):
        predict(scene)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("room", [100, 1500])
def test_a_full_disk_leaves_no_label_map(segmenter, tmp_path, room):
    scene = write_scene(tmp_path / "scene.tif", pixels(300, 200))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"scene_labels\.tif cannot be written: .*make room there"):
            segmenter.segment_scene(scene, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").iterdir())


def test_without_rasterio_the_extra_is_named(predict, scene, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ConfigError, match=r"internseg-ds\[rasters\]"):
        predict(scene)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__test_cfg__mode": "whole"}, "windows; add --cfg-options model.test_cfg.mode=slide"),
        ({"data__test__pipeline__1__flip": True}, "flip=True, and scenes are segmented in one view"),
        ({"data__test__pipeline__1__img_ratios": [0.5, 1.0]}, "2 scales, and scenes"),
        ({"data__test__pipeline__0__color_type": "grayscale"}, "reads images whole"),
    ],
)
def test_a_config_whose_images_are_no_scenes_is_refused(predict, scene, options, message):
    with pytest.raises(ConfigError, match=message):
        predict(scene, **options)


def test_an_image_that_is_to_be_turned_is_refused(predict, tmp_path):
    image = Image.fromarray(pixels(40, 50).transpose(1, 2, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(DataError, match=r"turned\.jpg is to be turned .*orientation 6"):
        predict(tmp_path / "turned.jpg")
