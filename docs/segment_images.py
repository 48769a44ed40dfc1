"""Segments the images of a folder, and says which classes take how much of each.

python docs/segment_images.py work_dirs/mine images --out pictures
"""

import argparse
from pathlib import Path

import numpy as np

from internseg_ds import Segmenter

AT_ONCE = 8
"""Images that are handed over together: their windows share forward passes, their results are in memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="a work directory, or what launch/consolidate.py has written")
    parser.add_argument("images", type=Path, help="a folder")
    parser.add_argument("--out", type=Path, required=True, help="where pictures go")
    args = parser.parse_args()

    segmenter = Segmenter.from_pretrained(args.weights)
    files = sorted(file for file in args.images.iterdir() if file.suffix.lower() in (".jpg", ".png"))
    args.out.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(files), AT_ONCE):
        some = files[first : first + AT_ONCE]
        for file, result in zip(some, segmenter(some), strict=True):
            result.picture.save(args.out / f"{file.stem}.png")
            pixels = np.bincount(result.labels.ravel(), minlength=len(result.classes))
            largest = np.argsort(-pixels)[:3]
            shares = ", ".join(f"{result.classes[k]} {pixels[k] / pixels.sum():.0%}" for k in largest)
            print(f"{file.name}: {shares}; mean score {result.scores.mean():.2f}")


if __name__ == "__main__":
    main()
