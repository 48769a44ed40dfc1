"""Polygons of a label map cover its pixels, and are GeoJSON as RFC 7946 has it."""

import json

import numpy as np
import pytest
import rasterio
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from internseg_ds.evaluation.scenes import shapes
from internseg_ds.evaluation.scenes.shapes import write_shapes
from tests.evaluation.scenes.conftest import UTM, pixels, write_scene

COARSE = {"crs": "EPSG:32633", "transform": rasterio.Affine(30.0, 0.0, 650_000.0, 0.0, -30.0, 7_200_000.0)}
"""Where straight lines of the map are far from straight in longitude and latitude."""
TURNED = {
    "crs": "EPSG:3857",
    "transform": rasterio.Affine.translation(1.5e6, 6.8e6) @ rasterio.Affine.rotation(30),
}
NAMES = ["water", "wood", "straße"]


def labels_with_regions(height, width):
    labels = pixels(height, width, 1) // 80  # 0 to 3
    labels[0, 10:20, 10:40] = 255
    labels[0, height // 2 :, : width // 2] = 2
    return labels


@pytest.mark.parametrize("place", [UTM, COARSE, TURNED, {}], ids=["utm", "coarse", "turned", "pixels"])
def test_polygons_drawn_again_are_the_label_map(tmp_path, monkeypatch, place):
    monkeypatch.setattr(shapes, "BLOCK", 100)
    labels = labels_with_regions(250, 330)
    path = write_scene(tmp_path / "labels.tif", labels, nodata=255, **place)
    count = write_shapes(path, tmp_path / "shapes.geojson", NAMES)
    collection = json.loads((tmp_path / "shapes.geojson").read_text(encoding="utf-8"))
    assert set(collection) == {"type", "features"} and len(collection["features"]) == count > 20
    drawn = []
    for feature in collection["features"]:
        label, geometry = feature["properties"]["class"], feature["geometry"]
        assert feature["properties"]["name"] == (NAMES[label] if label < 3 else "3")
        for number, ring in enumerate(geometry["coordinates"]):
            assert ring[0] == ring[-1] and len(ring) >= 4
            x, y = np.array(ring).T
            assert (np.sum((x[1:] - x[0]) * (y[:-1] - y[0]) - (x[:-1] - x[0]) * (y[1:] - y[0])) < 0) == (
                number == 0
            )
        if place:
            assert x.min() >= -180 and x.max() <= 180 and y.min() > 40 and y.max() < 80
            geometry = transform_geom("EPSG:4326", place["crs"], geometry)
        drawn.append((geometry, label))
    again = rasterize(
        drawn, labels.shape[1:], fill=255, transform=place.get("transform", rasterio.Affine.identity())
    )
    assert np.array_equal(again, labels[0])


def test_a_label_map_without_data_has_no_polygons(tmp_path):
    path = write_scene(tmp_path / "labels.tif", np.full((1, 9, 9), 255, np.uint8), nodata=255, **UTM)
    assert write_shapes(path, tmp_path / "shapes.geojson", NAMES) == 0
    assert json.loads((tmp_path / "shapes.geojson").read_text())["features"] == []


def test_shapes_are_written_beside_the_labels_where_asked_for(segmenter, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", pixels(60, 70), **UTM)
    outputs = segmenter.segment_scene(scene, tmp_path / "out", shapes=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "scene_labels.tif",
        "scene_shapes.geojson",
    ]
    with rasterio.open(outputs.labels) as file:
        found = {
            feature["properties"]["class"] for feature in json.loads(outputs.shapes.read_text())["features"]
        }
        assert found == set(np.unique(file.read(1)).tolist())


def test_a_local_coordinate_system_leaves_polygons_in_pixels(tmp_path, caplog):
    place = {"crs": rasterio.CRS.from_wkt('LOCAL_CS["site"]'), "transform": UTM["transform"]}
    path = write_scene(tmp_path / "labels.tif", labels_with_regions(30, 40), nodata=255, **place)
    with caplog.at_level("WARNING", "internseg_ds"):
        write_shapes(path, tmp_path / "shapes.geojson", NAMES)
    first, *_ = json.loads((tmp_path / "shapes.geojson").read_text(encoding="utf-8"))["features"]
    corners = np.array(first["geometry"]["coordinates"][0])
    assert corners.min() >= 0 and corners[:, 0].max() <= 40 and corners[:, 1].max() <= 30
    assert "polygons are in pixels" in caplog.text
