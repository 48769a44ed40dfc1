"""Label maps of scenes as other programs read them: georeference, tiles, compression, colours, no data."""

import json

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint

from internseg_ds.evaluation.scenes.label_file import LabelFormat, label_file
from internseg_ds.evaluation.sliding_window import Window
from tests.evaluation.scenes.conftest import CLASSES, UTM, pixels, write_scene


def test_georeference_tiles_compression_and_colours_are_in_the_file(segmenter, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", pixels(60, 600), **UTM)
    with rasterio.open(segmenter.segment_scene(scene, tmp_path / "out").labels) as file:
        assert file.crs == UTM["crs"] and file.transform == UTM["transform"]
        assert file.shape == (60, 600) and file.dtypes == ("uint8",) and file.nodata == 255
        assert file.block_shapes == [(512, 512)] and file.compression.name == "deflate"
        assert file.read_masks(1).all()
        colours = file.colormap(1)
        assert [colours[number][:3] for number in range(CLASSES)] == [(n, 255 - n, 7) for n in range(CLASSES)]
        assert json.loads(file.tags()["classes"]) == [f"class {number}" for number in range(CLASSES)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scene_labels.tif"]


def test_pixels_without_data_have_none_in_the_labels(segmenter, tmp_path):
    values = pixels(150, 130).clip(1)
    values[:, :90, :70] = 0  # whole windows, whole rows of them after that, and parts
    values[:, 100:, :] = 0
    values[0, 95, 95] = 0  # one channel alone says nothing yet
    scene = write_scene(tmp_path / "scene.tif", values, nodata=0, **UTM)
    with rasterio.open(segmenter.segment_scene(scene, tmp_path / "out").labels) as file:
        labels = file.read(1)
    assert np.array_equal(labels == 255, (values == 0).all(axis=0))
    shown = labels != 255
    assert np.array_equal(labels[shown], segmenter(scene).labels[shown])


def test_pixels_behind_an_alpha_channel_have_no_labels(segmenter, tmp_path):
    values = np.concatenate([pixels(40, 50), np.full((1, 40, 50), 255, np.uint8)])
    values[3, :, 45:], values[3, :9] = 0, 100
    scene = write_scene(tmp_path / "scene.tif", values, photometric="RGB", alpha="yes")
    with rasterio.open(segmenter.segment_scene(scene, tmp_path / "out").labels) as file:
        labels = file.read(1)
    assert np.array_equal(labels == 255, values[3] == 0)
    shown = labels != 255
    assert np.array_equal(labels[shown], segmenter(scene).labels[shown])


def test_a_further_channel_is_left_out_as_opencv_leaves_it_out(segmenter, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", pixels(40, 50, 4), photometric="RGB", alpha="unspecified")
    with rasterio.open(segmenter.segment_scene(scene, tmp_path / "out").labels) as file:
        assert np.array_equal(file.read(1), segmenter(scene).labels)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_without_a_place_are_scenes_too(segmenter, tmp_path, ending, channels):
    image = pixels(64, 90, channels).transpose(1, 2, 0)
    path = tmp_path / f"image.{ending}"
    cv2.imwrite(str(path), image)
    with rasterio.open(segmenter.segment_scene(path, tmp_path / "out").labels) as file:
        assert file.crs is None and file.transform.is_identity
        found = file.read(1)
    expected = segmenter(path).labels
    # GDAL and OpenCV have decoders of JPEG of their own
    assert (found != expected).mean() <= (0.02 if ending == "jpg" else 0)


def test_an_image_with_a_palette_is_read_in_its_colours(segmenter, tmp_path):
    scene = tmp_path / "palette.png"
    image = Image.fromarray(pixels(64, 90, 1)[0] // 32, mode="P")
    image.putpalette([channel for n in range(8) for channel in (30 * n, 255 - 20 * n, 11 * n)])
    image.save(scene)
    with rasterio.open(segmenter.segment_scene(scene, tmp_path / "out").labels) as file:
        assert np.array_equal(file.read(1), segmenter(scene).labels)


def test_control_points_stay(segmenter, tmp_path):
    points = [
        GroundControlPoint(row, column, 14 + column / 100, 52 - row / 100)
        for row, column in ((0, 0), (0, 50), (40, 0), (40, 50))
    ]
    scene = write_scene(tmp_path / "scene.tif", pixels(40, 50))
    with rasterio.open(scene, "r+") as file:
        file.gcps = (points, rasterio.CRS.from_epsg(4326))
    with rasterio.open(segmenter.segment_scene(scene, tmp_path / "out").labels) as file:
        found, crs = file.gcps
    assert crs == rasterio.CRS.from_epsg(4326)
    assert [(each.row, each.col, each.x, each.y) for each in found] == [
        (each.row, each.col, each.x, each.y) for each in points
    ]


@pytest.mark.parametrize(("classes", "dtype"), [(255, "uint8"), (256, "uint16"), (300, "uint16")])
def test_many_classes_take_16_bits(tmp_path, classes, dtype):
    scene = write_scene(tmp_path / "scene.tif", pixels(700, 40), **UTM)
    palette = [(number % 256, number // 256, 9) for number in range(classes)]
    with rasterio.open(scene) as raster:
        form = LabelFormat.of(raster, classes, [str(number) for number in range(classes)], palette)
    labels = np.arange(700 * 40).reshape(700, 40) % classes
    with label_file(tmp_path / "labels.tif", form, (0, 700)) as file:
        for top in range(0, 700, 90):
            file.write(Window(0, 700, 0, 40), top, labels[top : top + 90])
    with rasterio.open(tmp_path / "labels.tif") as file:
        assert file.dtypes == (dtype,) and file.nodata == np.iinfo(dtype).max
        assert np.array_equal(file.read(1), labels)
        assert file.colormap(1)[classes - 1][:3] == palette[-1]
