"""Scenes by windows have the labels that the inference of launch/test.py gives for the same image in one piece."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import rasterio
import torch

from internseg_ds import Segmenter
from internseg_ds.errors import DataError
from internseg_ds.evaluation.scenes.blending import Blend, BlendedRows
from internseg_ds.evaluation.scenes.predict import predict_scenes
from internseg_ds.evaluation.scenes.segmentation import SceneOptions
from internseg_ds.evaluation.scenes.windows import TILE, SceneWindows
from internseg_ds.evaluation.sliding_window import Window, windows
from tests.evaluation.scenes.conftest import PIPELINE, UTM, pixels, write_scene, write_weights


def labels_of(weights, scene, out, **options):
    (outputs,) = predict_scenes(
        weights.with_name("config.py"), weights, [scene], out, options=SceneOptions(**options)
    )
    with rasterio.open(outputs.labels) as file:
        return file.read(1)


@pytest.mark.parametrize(("height", "width"), [(190, 233), (40, 300), (30, 31)])
def test_labels_are_those_of_the_image_in_one_piece(weights, segmenter, tmp_path, height, width):
    scene = write_scene(tmp_path / "scene.tif", pixels(height, width), **UTM)
    expected = segmenter(scene).labels
    assert len(np.unique(expected)) >= 3
    assert np.array_equal(labels_of(weights, scene, tmp_path / "out"), expected)


def test_labels_of_a_binary_model_are_those_above_its_threshold(tmp_path):
    weights = write_weights(tmp_path, num_classes=2, out_channels=1, threshold=0.4)
    scene = write_scene(tmp_path / "scene.tif", pixels(70, 90))
    expected = Segmenter.from_pretrained(weights, device="cpu")(scene).labels
    assert len(np.unique(expected)) == 2
    assert np.array_equal(labels_of(weights, scene, tmp_path / "out"), expected)


def test_a_scene_of_many_channels_is_read_as_the_pipeline_reads_it(tmp_path):
    """16 bits, channels by number, and values that say nothing: by the rules of `LoadRaster`."""
    steps = copy.deepcopy(PIPELINE)
    steps[0] = dict(type="LoadRaster", channels=[5, 1, 2, 4], nodata=900)
    steps[1]["transforms"][2] = dict(
        type="Normalize", mean=[1000.0, 1200.0, 900.0, 800.0], std=[400.0, 500.0, 450.0, 300.0], to_rgb=False
    )
    settings = {"data.test.pipeline": steps, "model.backbone.in_chans": 4}
    weights = write_weights(tmp_path, settings=settings)
    values = pixels(100, 90, 5).astype(np.uint16) * 8
    values[:, 20:40, 30:80] = 0
    scene = write_scene(tmp_path / "scene.tif", values, nodata=0, **UTM)
    expected = Segmenter.from_pretrained(weights, device="cpu")(scene).labels
    expected[(values == 0).all(axis=0)] = 255
    assert len(np.unique(expected)) >= 3
    assert np.array_equal(labels_of(weights, scene, tmp_path / "out"), expected)
    few = write_scene(tmp_path / "few.tif", values[:3])
    with pytest.raises(DataError, match=r"few\.tif has 3 channels.* names number 5"):
        labels_of(weights, few, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_share_a_scene(weights, segmenter, tmp_path, launch):
    scene = write_scene(tmp_path / "scene.tif", pixels(2 * TILE + 30, 60), **UTM)
    out = tmp_path / "out"
    config = weights.with_name("config.py")
    launch("launch/predict.py", config, weights, scene, "--scenes", "--shapes", "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["scene_labels.tif", "scene_shapes.geojson"]
    with rasterio.open(out / "scene_labels.tif") as file:
        assert file.crs == UTM["crs"] and file.colormap(1)[1][:3] == (1, 254, 7)
        # other windows share forward passes, which changes the last bits of logits
        assert (file.read(1) != segmenter(scene).labels).mean() < 1e-4


def test_a_wide_scene_in_several_pieces_has_the_same_labels(weights, segmenter, tmp_path, capfd):
    scene = write_scene(tmp_path / "scene.tif", pixels(90, 3 * TILE - 40))
    found = labels_of(weights, scene, tmp_path / "out", memory_gib=1e-4)
    assert "3 pieces will take" in capfd.readouterr().err
    # other windows share forward passes, which changes the last bits of logits
    assert (found != segmenter(scene).labels).mean() < 1e-4


def test_tapered_windows_leave_labels_between_those_of_the_windows(weights, segmenter, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", pixels(100, 120))
    outputs = segmenter.segment_scene(scene, tmp_path / "out", blend="tapered")
    with rasterio.open(outputs.labels) as file:
        found = file.read(1)
    mean = segmenter(scene).labels
    assert 0 < (found != mean).mean() < 0.3
    corner = np.s_[:42, :35]  # under one window alone, whatever its weights
    assert np.array_equal(found[corner], mean[corner])


@pytest.mark.parametrize("blend", ["mean", "tapered"])
def test_logits_are_the_weighted_mean_of_the_windows(blend):
    assert_weighted_means(blend, kept=lambda window: True)


def test_windows_that_are_left_out_leave_no_logits():
    """Of a scene with data in two corners: rows without any window between them, columns without any beside them."""
    assert_weighted_means(
        "mean", kept=lambda window: (window.top < 5 and window.left < 15) or window.top == 15
    )


def assert_weighted_means(blend: Blend, kept: Callable[[Window], bool]) -> None:
    height, width, classes, crop, stride = 23, 31, 3, (8, 10), (5, 10)
    grid = [window for window in windows(height, width, crop, stride) if kept(window)]
    logits = torch.randn(len(grid), classes, *crop, generator=torch.manual_seed(0))

    def weight(side):
        return 1 - np.abs((2 * np.arange(side) + 1) / side - 1) if blend == "tapered" else np.ones(side)

    sums, weights = np.zeros((classes, height, width)), np.zeros((height, width))
    for window, part in zip(grid, logits.double().numpy(), strict=True):
        place = np.s_[window.top : window.bottom, window.left : window.right]
        taper = np.outer(weight(crop[0]), weight(crop[1]))
        sums[:, place[0], place[1]] += part * taper
        weights[place] += taper
    scene = SceneWindows.over((height, width), (height, width), crop, stride)
    blended = BlendedRows(scene.piece(Window(0, height, 0, width)), classes, blend, torch.device("cpu"))
    found = np.full((classes, height, width), np.nan)
    following = 0
    for each in [
        *(blended.add(window, part) for window, part in zip(grid, logits, strict=True)),
        blended.rest(),
    ]:
        for (top, bottom), (left, right), done in each:
            assert top == following
            following = bottom
            found[:, top:bottom, left:right] = done
    assert following == height
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, sums / weights, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("widest", [1, 1500, 10**6])
def test_pieces_cover_a_scene_once_with_all_windows_of_each_pixel(ranks, widest):
    size, crop, stride = (1700, 2900), (200, 300), (120, 170)
    scene = SceneWindows.over(size, size, crop, stride)
    covered = np.zeros(size, np.int8)
    for rank in range(ranks):
        pieces = scene.pieces(scene.slab(rank, ranks), widest)
        assert len(pieces) == {1: 6, 1500: 3, 10**6: 1}[widest]
        for piece in pieces:
            area = piece.area
            covered[area.top : area.bottom, area.left : area.right] += 1
            assert area.top % TILE == area.left % TILE == 0
            assert widest < TILE or piece.right - piece.left <= widest
            expected = [
                window
                for window in windows(*size, crop, stride)
                if window.top < area.bottom
                and window.bottom > area.top
                and window.left < area.right
                and window.right > area.left
            ]
            assert [window for band in piece.bands() for window in band] == expected
    assert (covered == 1).all()
