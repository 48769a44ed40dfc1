"""Windows per second over a large scene, read, segmented and written by windows in bounded memory
(`launch/predict.py --scenes`), against the windows of launch/test.py over the same image held in memory as a whole; and
the peak memory of scenes of two heights.

    python benchmarks/large_scenes.py                                        the tiny model
    python benchmarks/large_scenes.py --config CONFIG --height 8192 --width 8192       another model, on a GPU

Weights are random: of the labels it is only looked at whether both sides give the same. Both sides read the same tiled,
compressed GeoTIFF: ours writes a GeoTIFF, the other copies labels to the host. Memory is resident memory, and on a GPU
also what torch has allocated there. Ends with a line of JSON: scenes_over_windows (windows per second, median of the
rounds' ratios), and the same by seconds of the processor, which other programs on the machine disturb less.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evaluate import TINY, segmentor_of
from internseg_ds.cli import command_line

STRIP = 512
ONE_SIZE = {"img_scale": None, "img_ratios": [1.0]}
"""Of MultiScaleFlipAug: images at the size that they have."""


def write_scene(path: Path, height: int, width: int) -> Path:
    """Rows of blobs with noise, 8-bit RGB."""
    import rasterio

    coarse = torch.rand(1, 3, STRIP // 32, width // 32 + 1, generator=torch.manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (STRIP, width), mode="bilinear")[0] * 220
    noise = torch.randint(0, 30, smooth.shape, generator=torch.manual_seed(1))
    strip = (smooth + noise).byte().numpy()
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 3,
        "height": height,
        "width": width,
        "crs": "EPSG:32633",
    }
    place = rasterio.Affine(0.5, 0.0, 400_000.0, 0.0, -0.5, 5_800_000.0)
    with rasterio.open(
        path, "w", transform=place, tiled=True, blockxsize=512, blockysize=512, compress="deflate", **profile
    ) as file:
        for top in range(0, height, STRIP):
            rows = min(STRIP, height - top)
            file.write(strip[:, :rows], window=((top, top + rows), (0, width)))
    return path


def clocks() -> np.ndarray:
    """Seconds of the clock, and of this process's work."""
    return np.array([time.perf_counter(), time.process_time()])


class Sides:
    """The two ways to segment a scene with one model."""

    def __init__(self, config: str, options: dict[str, Any], blend: str) -> None:
        from internseg_ds.config.experiment import read_experiment
        from internseg_ds.distributed.process_group import World
        from internseg_ds.evaluation.predict import classes_of
        from internseg_ds.evaluation.scenes.pixel_steps import PixelSteps
        from internseg_ds.evaluation.scenes.segmentation import SceneOptions

        experiment = read_experiment(config, options)
        self.pipeline = experiment.test["pipeline"]
        for step in self.pipeline:
            if step["type"] == "MultiScaleFlipAug":
                step.update(ONE_SIZE)
                step["transforms"] = [
                    each for each in step["transforms"] if each["type"] != "ResizeToMultiple"
                ]
        self.world = World()
        self.device = self.world.device
        self.segmentor = segmentor_of(experiment.model, self.device, seed=0)
        self.steps = PixelSteps.of(self.pipeline)
        self.classes, self.palette = classes_of(experiment, {})
        self.options = SceneOptions(blend=blend)

    def by_scene(self, path: Path, folder: Path) -> np.ndarray:
        """The label map that launch/predict.py --scenes writes."""
        import rasterio

        from internseg_ds.distributed.gathering import Forwards
        from internseg_ds.evaluation.scenes.outputs import outputs_of
        from internseg_ds.evaluation.scenes.scene_file import Scene
        from internseg_ds.evaluation.scenes.segmentation import SceneSegmentation
        from internseg_ds.evaluation.sliding_window import SlidingWindowInference

        inference = SlidingWindowInference(Forwards(self.segmentor))
        segmentation = SceneSegmentation(
            inference, list(self.classes), self.palette, self.options, self.world, self.device
        )
        outputs = outputs_of(path, folder, shapes=False)
        outputs.labels.unlink(missing_ok=True)
        with Scene(path, self.steps) as scene:
            began = clocks()
            segmentation.segment(scene, outputs)
            self.seconds = clocks() - began
        with rasterio.open(outputs.labels) as file:
            return file.read(1)

    def by_windows(self, path: Path) -> np.ndarray:
        """The labels that launch/test.py compares with the ground truth."""
        from internseg_ds.data.image_files import ImageFiles
        from internseg_ds.data.loading import evaluation_images
        from internseg_ds.distributed.gathering import Forwards
        from internseg_ds.evaluation.sliding_window import SlidingWindowInference

        dataset = ImageFiles([path], self.pipeline)
        began = clocks()
        images = evaluation_images(dataset, rank=0, world_size=1, workers=0, device=self.device, truth=False)
        inference = SlidingWindowInference(Forwards(self.segmentor))
        (found,) = inference.predict((image.index, image.inputs) for image in images)
        labels = found.labels.cpu().numpy()
        self.seconds = clocks() - began
        return labels

    def windows(self, height: int, width: int) -> int:
        from internseg_ds.evaluation.sliding_window import windows

        test_cfg = self.segmentor.test_cfg
        return len(windows(height, width, test_cfg.crop_size, test_cfg.stride))


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Of this process, since `reset_peaks`."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    found = {"resident": 1024 * int(line.split()[1])}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device)
    return found


def reset_peaks(device: torch.device) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # of VmHWM (Linux, proc(5))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measure_memory(sides: Sides, folder: Path, heights: list[int], width: int) -> list[dict[str, int]]:
    """Peaks by height, after a scene that loads what all need."""
    sides.by_scene(write_scene(folder / "first.tif", min(heights), width), folder)
    peaks = []
    for height in heights:
        scene = write_scene(folder / "tall.tif", height, width)
        reset_peaks(sides.device)
        sides.by_scene(scene, folder)
        peaks.append(peak_bytes(sides.device))
        words = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in peaks[-1].items())
        print(f"peak memory of a scene of {height} x {width}: {words}", flush=True)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/large_scenes.py --height 1500 --width 1500 --rounds 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=str(TINY), help="experiment config (default: %(default)s)")
    parser.add_argument(
        "--height", type=int, default=1200, help="of the scene, in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=1200, help="of the scene, in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each, in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--times", type=int, default=4, help="height of the tall scene over that of the short one"
    )
    parser.add_argument("--blend", default="mean", choices=("mean", "tapered"))
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="as launch/train.py takes them"
    )
    args = parser.parse_args()

    from mmcv import DictAction

    options = {
        key: DictAction._parse_iterable(value)
        for key, value in (item.split("=", 1) for item in args.cfg_options)
    }
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        sides = Sides(args.config, {"model.backbone.pretrained": None, **options}, args.blend)
        peaks = measure_memory(sides, folder, [args.height, args.times * args.height], args.width)
        scene = write_scene(folder / "scene.tif", args.height, args.width)
        count = sides.windows(args.height, args.width)
        seconds: dict[str, list[np.ndarray]] = {"scenes": [], "windows": []}
        for number in range(args.rounds + 1):  # the first warms up
            ours = sides.by_scene(scene, folder)
            took = sides.seconds
            theirs = sides.by_windows(scene)
            if number:
                seconds["scenes"].append(took)
                seconds["windows"].append(sides.seconds)
        differing = float((ours != theirs).mean())
        ratios, by_work = np.array(seconds["windows"]).T / np.array(seconds["scenes"]).T
        print(
            f"\n{args.height} x {args.width} pixels, {count} windows, on {sides.device.type}; labels differ: "
            f"{differing:.1e}"
        )
        for who, values in seconds.items():
            wall, work = np.array(values).T
            print(
                f"{who:8} {count / statistics.median(wall):8.1f} windows/s   rounds: "
                f"{', '.join(f'{value:.2f} s' for value in wall)} (of the processor: "
                f"{', '.join(f'{value:.2f} s' for value in work)})"
            )
        print(
            json.dumps(
                {
                    "scenes_over_windows": round(float(np.median(ratios)), 4),
                    "least": round(float(min(ratios)), 4),
                    "most": round(float(max(ratios)), 4),
                    "by_work": [round(float(find(by_work)), 4) for find in (np.median, min, max)],
                    "windows": count,
                    "device": sides.device.type,
                    "labels_differ": differing,
                    "peak_mib": [{key: round(size / 2**20) for key, size in each.items()} for each in peaks],
                    "times_the_height": args.times,
                }
            )
        )


if __name__ == "__main__":
    command_line.run(main)
