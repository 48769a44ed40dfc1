"""Seconds of the data doctor's look at all images and label maps, against merely decoding the same files in as
many processes, in turn.

    python benchmarks/check_data.py [--images 800] [--size 512] [--workers 2] [--rounds 5]

Writes generated photographs (JPEG) and label maps (PNG) of 1.33 x SIZE by SIZE pixels into a temporary folder.
Ends with a line of JSON: ratio = median of the doctor / median of decoding; cpu_ratio = the same of the seconds
that the cores worked, which other jobs on the machine change less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmseg.datasets import CustomDataset
from torch.utils.data import DataLoader, Dataset

from internseg_ds.data.checks.duplicates import find_duplicates
from internseg_ds.data.checks.looks import annotation_of, image_file, label_loader
from internseg_ds.data.checks.scan import CHUNK, scan
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.loading import loaded, quiet_worker

CLASSES = 20


class Decoded(Dataset):
    """Each image and label map decoded as a training decodes them, and thrown away."""

    def __init__(self, part: CustomDataset) -> None:
        self.part, self.loader = part, label_loader(part, training=True)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> int:
        image = cv2.imread(image_file(self.part, index))
        results = annotation_of(self.part, index)
        labels = self.loader.read(f"{results['seg_prefix']}/{results['ann_info']['seg_map']}")
        return image.size + labels.size


def write(root: Path, images: int, size: int) -> None:
    generator = np.random.default_rng(0)
    width = size * 4 // 3
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for index in range(images):
        coarse = generator.integers(0, 255, (size // 16, width // 16, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, size), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        noisy = np.clip(image + generator.integers(-12, 12, image.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(root / f"images/{index}.jpg"), noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])
        areas = generator.integers(0, CLASSES, (size // 32, width // 32), dtype=np.uint8)
        labels = cv2.resize(areas, (width, size), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(root / f"labels/{index}.png"), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.images, args.size)
        steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
        entry = dict(
            type="CustomDataset", data_root=folder, img_dir="images", ann_dir="labels", pipeline=steps
        )
        names = [f"class {index}" for index in range(CLASSES)]
        part: Any = build_datasets(dict(entry, classes=names), "data.train")

        def doctor() -> None:
            found = scan([part], "data.train", training=True, workers=args.workers)
            find_duplicates(found.looks, found.looks[: len(found.looks) // 10])

        def decoding() -> None:
            loader = DataLoader(
                Decoded(part), CHUNK, num_workers=args.workers, collate_fn=list, worker_init_fn=quiet_worker
            )
            for _ in loaded(loader):
                pass

        seconds: dict[str, list[float]] = {"doctor": [], "decoding": []}
        worked: dict[str, list[float]] = {"doctor": [], "decoding": []}
        for number in range(args.rounds):
            both = [("doctor", doctor), ("decoding", decoding)]
            for name, run in both if number % 2 == 0 else both[::-1]:
                began, before = time.perf_counter(), sum(os.times()[:4])
                run()
                seconds[name].append(time.perf_counter() - began)
                worked[name].append(sum(os.times()[:4]) - before)
            print(", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()), flush=True)
    cpu = {name: statistics.median(values) for name, values in worked.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "ratio": round(medians["doctor"] / medians["decoding"], 3),
                "cpu_ratio": round(cpu["doctor"] / cpu["decoding"], 3),
                "images": args.images,
                "workers": args.workers,
                **{f"{name}_s": round(value, 2) for name, value in medians.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
