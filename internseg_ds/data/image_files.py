"""Image files that are no data set: found by path, folder or glob, and read through an mmseg test
pipeline."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets.pipelines import Compose
from torch.utils.data import Dataset

from internseg_ds.data.checks.pipeline_steps import check_steps
from internseg_ds.errors import ConfigError, DataError, reason_of

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class ImageFiles(Dataset):
    """Image files through an mmseg test pipeline. Raises ConfigError when it cannot be built, or its
    predictions would not lie on the images."""

    def __init__(self, images: Sequence[Path], pipeline: Sequence[dict[str, Any]]) -> None:
        try:
            self.images, self.pipeline = images, Compose(pipeline)
        except Exception as error:  # whatever a transform's constructor refuses with
            raise ConfigError(f"the pipeline of data.test cannot be built: {reason_of(error)}") from error
        check_steps(self.pipeline.transforms, "data.test", evaluates=True)
        self.img_infos = [{"filename": str(path)} for path in images]

    def __len__(self) -> int:
        return len(self.images)

    def pre_pipeline(self, results: dict[str, Any]) -> None:
        """What mmseg's data sets add before the first step of a pipeline."""
        results.update(img_prefix=None, seg_fields=[])

    def __getitem__(self, index: int) -> dict[str, Any]:
        results: dict[str, Any] = {"img_info": self.img_infos[index]}
        self.pre_pipeline(results)
        return self.pipeline(results)


def picture(dataset: Any, index: int) -> np.ndarray:
    """An image of an mmseg data set, or of `ImageFiles`, to look at: (h, w, 3) uint8 BGR, as its pipeline
    loads it.

    Of other than 8-bit images with 3 channels, the first three channels (or the only one), stretched from
    their least to their largest value.
    """
    results: dict[str, Any] = {
        "img_info": dataset.img_infos[index],
        "ann_info": dataset.img_infos[index].get("ann"),
    }
    dataset.pre_pipeline(results)
    for step in dataset.pipeline.transforms:
        results = step(results)
        if "img" in results:
            break
    image = results["img"]
    image = image[..., None] if image.ndim == 2 else image
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    values = np.nan_to_num(shown.astype(np.float64))
    least, largest = values.min(), values.max()
    return np.round((values - least) * (255 / max(largest - least, 1e-12))).astype(np.uint8)


def find_images(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The image files that `paths` name: files, globs ("frames/**/*.png"), and the images of folders; frame_2
    before frame_10.

    Raises DataError when one is missing or nothing is found.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(
                (item for item in path.iterdir() if item.suffix.lower() in IMAGE_ENDINGS and item.is_file()),
                key=_natural,
            )
        elif path.is_file():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = [
                match
                for match in map(Path, glob.glob(str(path), recursive=True))
                if match.suffix.lower() in IMAGE_ENDINGS and match.is_file()
            ]
            if not matches:
                raise DataError(f"no image ({', '.join(IMAGE_ENDINGS)}) matches {path}")
            found += sorted(matches, key=_natural)
        else:
            raise DataError(f"there is no image or folder {path}")
    if not found:
        raise DataError(f"no image ({', '.join(IMAGE_ENDINGS)}) in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(found))


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts numbers in names by value."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(path))]
