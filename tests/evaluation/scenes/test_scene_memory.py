"""Memory does not grow with the height of a scene, and stays below what is stated before it starts."""

import json
import re
from pathlib import Path

import numpy as np
import rasterio

from internseg_ds import Segmenter
from tests.conftest import free_port
from tests.evaluation.scenes.conftest import pixels, write_weights
from tests.forks import start_ranks

WIDTH, SHORT, TALL = 224, 224, 10 * 224
CLASSES = 80
MIB = 2**20


def peak_of(segmenter: Segmenter, scene: Path, out: Path) -> int:
    """Most bytes of resident memory while a scene is segmented."""
    Path("/proc/self/clear_refs").write_text("5")  # of VmHWM (Linux, proc(5))
    segmenter.segment_scene(scene, out)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(weights: Path, folder: Path) -> None:
    segmenter = Segmenter.from_pretrained(weights, device="cpu")
    peaks = {}
    for name in ("first", "short", "tall"):  # the first loads what all need
        peaks[name] = peak_of(segmenter, folder / f"{name}.tif", folder / "out")
    (folder / "peaks.json").write_text(json.dumps(peaks))


def test_a_scene_of_ten_times_the_height_takes_no_more_memory(tmp_path):
    # windows that touch, and do not overlap: few of them
    settings = {
        "model.test_cfg.crop_size": (112, 112),
        "model.test_cfg.stride": (112, 112),
        "model.test_cfg.batch_size": 2,  # the short scene has 4 windows
    }
    weights = write_weights(tmp_path, settings=settings, num_classes=CLASSES)
    strip = pixels(SHORT, WIDTH)
    for name, height in (("first", SHORT), ("short", SHORT), ("tall", TALL)):
        profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": height, "width": WIDTH}
        with rasterio.open(tmp_path / f"{name}.tif", "w", tiled=True, **profile) as file:
            for top in range(0, height, SHORT):
                file.write(strip, window=((top, top + SHORT), (0, WIDTH)))
    (rank,) = start_ranks(measure, 1, free_port(), weights, tmp_path)
    rank.join()
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    logits = CLASSES * TALL * WIDTH * 4
    assert logits > 150 * MIB
    assert peaks["tall"] - peaks["short"] < 30 * MIB
    with rasterio.open(tmp_path / "out" / "tall_labels.tif") as file:
        assert file.shape == (TALL, WIDTH) and len(np.unique(file.read(1))) >= 3
