"""Windows of real GeoTIFFs, against the arrays that were written into them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio

from internseg_ds.data.rasters.files import open_raster, read_window
from internseg_ds.errors import ConfigError, DataError


def written(path: Path, values: np.ndarray, **profile: object) -> Path:
    """values: (h, w, channels)."""
    height, width, count = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=values.dtype, **profile
    ) as file:
        file.write(values.transpose(2, 0, 1))
    return path


@pytest.fixture
def scene() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (70, 90, 5)).astype(np.uint16)


@pytest.mark.parametrize(
    ("row", "column", "height", "width"),
    [(0, 0, 70, 90), (13, 21, 32, 40), (-5, -7, 20, 20), (60, 80, 32, 32), (100, 0, 8, 8), (-9, -9, 99, 199)],
)
def test_a_window_is_that_part_of_the_scene_with_the_fill_beyond_its_borders(
    tmp_path, scene, row, column, height, width
):
    whole = np.pad(scene, ((200, 200), (200, 200), (0, 0)), constant_values=7)
    with open_raster(written(tmp_path / "a.tif", scene, tiled=True, blockxsize=32, blockysize=32)) as dataset:
        window = read_window(dataset, row, column, height, width, fill=7)
    assert window.dtype == np.uint16 and window.flags.c_contiguous
    np.testing.assert_array_equal(
        window, whole[200 + row : 200 + row + height, 200 + column : 200 + column + width]
    )


def test_channels_are_read_in_the_order_asked_for(tmp_path, scene):
    with open_raster(written(tmp_path / "a.tif", scene)) as dataset:
        window = read_window(dataset, 3, 4, 10, 11, channels=[5, 1])
    np.testing.assert_array_equal(window, scene[3:13, 4:15][..., [4, 0]])


def test_a_file_that_is_missing_damaged_or_complex_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no raster .*none\.tif"):
        open_raster(tmp_path / "none.tif")
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(DataError, match=r"raster .*text\.tif cannot be read: .*copy it again"):
        open_raster(tmp_path / "text.tif")
    radar = written(tmp_path / "radar.tif", np.ones((8, 8, 1), np.complex64))
    with pytest.raises(DataError, match=r"radar\.tif has values of complex64"):
        open_raster(radar)


def test_a_file_cut_short_is_named_when_the_missing_part_is_read(tmp_path, scene):
    path = written(tmp_path / "a.tif", scene, tiled=True, blockxsize=32, blockysize=32)
    path.write_bytes(path.read_bytes()[:20_000])
    with open_raster(path) as dataset, pytest.raises(DataError, match=r"raster .*a\.tif cannot be read"):
        read_window(dataset, 0, 0, 70, 90)


def test_without_rasterio_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ConfigError, match=r"internseg-ds\[rasters\]"):
        open_raster(tmp_path / "a.tif")
