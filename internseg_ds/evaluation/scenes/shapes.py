"""The regions of a label map as polygons: GeoJSON (RFC 7946), one feature for each region of one class.

In: a label map on disk. Out: a file with one feature a line, in longitude and latitude (WGS84) where the map has a CRS,
else, and where that is a local one, in pixels (column, row). Held in memory are the polygons of one block of the map
at a time: a region that reaches over the border of a block is cut there, into one polygon for each.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from internseg_ds.evaluation.scenes.label_file import opened
from internseg_ds.progress import tracked

log = logging.getLogger(__name__)

BLOCK = 1024
"""Side of a block in pixels. At worst each of its pixels is a polygon of its own: some 2 GiB."""
LONGEST = 64
"""Pixels. Longer edges get vertices in between, where a straight line of the map is none in longitude and latitude."""
WGS84 = "EPSG:4326"
FEWEST_DECIMALS = 7
"""Of a degree: 1 cm."""
Ring = np.ndarray
"""(n, 2) float64, closed: columns and rows in pixels, or coordinates (x, y)."""


def write_shapes(labels: Path, out: Path, classes: Sequence[str]) -> int:
    """Write the polygons of a label map; returns how many. Pixels of no data have none. Each feature has the
    properties class (its number) and name. Raises OSError where the disk is full."""
    count = 0
    with opened(labels) as raster, out.open("w", encoding="utf-8") as file:
        on_earth = _is_on_earth(raster)
        if raster.crs is not None and not on_earth:
            log.warning("%s has a local coordinate system, so its polygons are in pixels", labels)
        file.write('{"type": "FeatureCollection", "features": [')
        corners = list(product(range(0, raster.height, BLOCK), range(0, raster.width, BLOCK)))
        for top, left in tracked(corners, "writing polygons", len(corners), "blocks"):
            for label, rings in _polygons(raster, top, left, on_earth=on_earth):
                name = classes[label] if label < len(classes) else str(label)
                feature = {
                    "type": "Feature",
                    "properties": {"class": label, "name": name},
                    "geometry": {"type": "Polygon", "coordinates": rings},
                }
                file.write(",\n" if count else "\n")
                json.dump(feature, file, ensure_ascii=False)
                count += 1
        file.write("\n]}\n")
    return count


def _is_on_earth(raster: Any) -> bool:
    """Whether its coordinates lead to longitude and latitude; those of a building site's own system do not."""
    from rasterio.warp import transform  # here: an optional package

    if raster.crs is None:
        return False
    try:
        transform(raster.crs, WGS84, [raster.transform.c], [raster.transform.f])
    except Exception:  # GDAL's, which rasterio has in a private module
        return False
    return True


def _polygons(
    raster: Any, top: int, left: int, *, on_earth: bool
) -> Iterator[tuple[int, list[list[list[float]]]]]:
    """(class, rings as GeoJSON has them) of each region of a block."""
    from rasterio.features import shapes  # here: an optional package

    window = ((top, min(top + BLOCK, raster.height)), (left, min(left + BLOCK, raster.width)))
    labels = raster.read(1, window=window)
    offset = np.array([left, top])
    found = [
        (int(label), [np.array(ring) + offset for ring in shape["coordinates"]])
        for shape, label in shapes(labels, mask=labels != raster.nodata)
    ]
    if not found:
        return
    decimals = 0
    rings = [ring for _, polygon in found for ring in polygon]
    if on_earth:
        rings, decimals = _in_wgs84(raster, [_with_vertices(ring) for ring in rings])
    placed = iter(rings)
    for label, polygon in found:
        coordinates = []
        for number, _ in enumerate(polygon):
            ring = next(placed)
            # the outer ring counterclockwise, holes clockwise (RFC 7946, 3.1.6)
            turned = ring if (_signed_area(ring) > 0) == (number == 0) else ring[::-1]
            coordinates.append(turned.round(decimals).tolist())
        yield label, coordinates


def _with_vertices(ring: Ring) -> Ring:
    """A ring along pixels' borders, with vertices at each multiple of LONGEST: the same ones on both sides of a
    border, so that neighbours still meet."""
    points = [ring[:1]]
    for start, end in pairwise(ring):
        axis = int(start[0] == end[0])
        low, high = sorted((start[axis], end[axis]))
        between = np.arange(math.floor(low / LONGEST) + 1, math.ceil(high / LONGEST)) * LONGEST
        added = np.repeat(start[None], len(between), axis=0)
        added[:, axis] = between if end[axis] > start[axis] else between[::-1]
        points += [added, end[None]]
    return np.concatenate(points)


def _in_wgs84(raster: Any, rings: list[Ring]) -> tuple[list[Ring], int]:
    """Rings in pixels -> in longitude and latitude, and the decimals that tell a hundredth of a pixel."""
    from rasterio.warp import transform  # here: an optional package

    points = np.concatenate(rings)
    matrix = np.array(raster.transform).reshape(3, 3)
    x, y = matrix[:2, :2] @ points.T + matrix[:2, 2:]
    longitude, latitude = transform(raster.crs, WGS84, x, y)
    placed = np.stack([longitude, latitude], axis=1)
    # sides of a pixel along the first edge, in degrees
    step = np.abs(placed[1] - placed[0]).max() / max(np.abs(points[1] - points[0]).max(), 1)
    decimals = max(FEWEST_DECIMALS, math.ceil(-math.log10(step / 100)) if step > 0 else 0)
    return np.split(placed, np.cumsum([len(ring) for ring in rings])[:-1]), decimals


def _signed_area(ring: Ring) -> float:
    """Above 0 for a ring that runs counterclockwise where y points up."""
    x, y = (ring - ring[0]).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
