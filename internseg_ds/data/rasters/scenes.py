"""Data sets whose scenes are evaluated window by window: each window is an entry by itself.

In: a data set of mmseg. Out: the same, with more entries.
"""

import os
from typing import Any

from internseg_ds.data.rasters.files import open_raster
from internseg_ds.data.rasters.loading import raster_loader
from internseg_ds.data.rasters.windows import WINDOW, tiles, with_window
from internseg_ds.errors import DataError


def cut_into_tiles(part: Any) -> None:
    """Puts an entry for each window in the place of each scene, where the pipeline's `LoadRaster` has `tile`. A scene
    that cannot be read stays one entry, and is named when it is its turn.

    part: a plain data set of mmseg. Raises ConfigError where rasterio is missing.
    """
    loader = raster_loader(part.pipeline.transforms)
    if loader is None or loader.tile is None:
        return
    found: list[dict[str, Any]] = []
    for info in part.img_infos:
        if WINDOW in info:
            found.append(info)
            continue
        try:
            with open_raster(os.path.join(part.img_dir or "", info["filename"])) as dataset:
                scene = (dataset.height, dataset.width)
        except DataError:
            found.append(info)
            continue
        found += [with_window(info, window) for window in tiles(scene, loader.tile)]
    part.img_infos = found
