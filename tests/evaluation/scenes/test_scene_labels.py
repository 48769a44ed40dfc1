"""Scenes by windows have the labels that launch/test.py's inference gives for the same image in one piece."""

import numpy as np
import pytest
import rasterio

from internseg_ds import Segmenter
from internseg_ds.evaluation.scenes.predict import predict_scenes
from internseg_ds.evaluation.scenes.segmentation import SceneOptions
from tests.evaluation.scenes.conftest import UTM, pixels, write_scene


def labels_of(weights, scene, out, **options):
    (outputs,) = predict_scenes(
        weights.with_name("config.py"), weights, [scene], out, options=SceneOptions(**options)
    )
    with rasterio.open(outputs.labels) as file:
        return file.read(1)


@pytest.fixture(scope="module")
def segmenter(weights):
    return Segmenter.from_pretrained(weights, device="cpu")


@pytest.mark.parametrize(("height", "width"), [(190, 233), (56, 140), (40, 300), (30, 31)])
def test_labels_are_those_of_the_image_in_one_piece(weights, segmenter, tmp_path, height, width):
    scene = write_scene(tmp_path / "scene.tif", pixels(height, width), **UTM)
    found = labels_of(weights, scene, tmp_path / "out")
    expected = segmenter(scene).labels
    assert len(np.unique(expected)) >= 3
    assert np.array_equal(found, expected)
