"""Images that are no data set: files found by path, folder or glob, or what a program has in memory, read through
an mmseg test pipeline."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets.pipelines import Compose
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from internseg_ds.data.checks.pipeline_steps import check_steps
from internseg_ds.data.rasters.image_check import check_images_of
from internseg_ds.data.rasters.loading import KEPT, LoadRaster
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
        check_images_of(self.pipeline.transforms)
        self.img_infos: list[dict[str, Any]] = [{"filename": str(path)} for path in images]

    def __len__(self) -> int:
        return len(self.images)

    def pre_pipeline(self, results: dict[str, Any]) -> None:
        """What mmseg's data sets add before the first step of a pipeline."""
        results.update(img_prefix=None, seg_fields=[])

    def __getitem__(self, index: int) -> dict[str, Any]:
        results: dict[str, Any] = {"img_info": self.img_infos[index]}
        self.pre_pipeline(results)
        return self.pipeline(results)


class GivenImages(ImageFiles):
    """Images as a program has them, through an mmseg test pipeline: paths of files, PIL images, and arrays.

    What is no path takes the place of what the pipeline's first step would load: a PIL image, or an array (h, w,
    3) or (h, w) uint8, of RGB or of grey; of a pipeline that loads other images than 8-bit ones in colour, any array
    as that step would give it. Raises DataError for anything else, and ConfigError as `ImageFiles` does.
    """

    def __init__(self, images: Sequence[Any], pipeline: Sequence[dict[str, Any]]) -> None:
        named = [
            Path(image) if isinstance(image, (str, os.PathLike)) else Path(f"image {number}")
            for number, image in enumerate(images)
        ]
        super().__init__(named, pipeline)
        steps = self.pipeline.transforms
        load = steps[0]
        in_colour = type(load).__name__ == "LoadImageFromFile" and load.color_type == "color"
        for name, info, image in zip(named, self.img_infos, images, strict=True):
            if not isinstance(image, (str, os.PathLike)):
                info["pixels"] = _pixels(image, str(name), in_colour=in_colour)
            elif not name.is_file():
                raise DataError(f"there is no image {name}")
        as_float = getattr(load, "to_float32", False)
        steps[0] = lambda results: (
            as_loaded(results, as_float, raster=isinstance(load, LoadRaster))
            if "pixels" in results["img_info"]
            else load(results)
        )


def _pixels(image: Any, name: str, *, in_colour: bool) -> np.ndarray:
    """The array that a pipeline would load: (h, w, 3) uint8 BGR where it loads `in_colour`. Raises DataError for
    what is no image."""
    if isinstance(image, Image.Image):
        try:
            turned = ImageOps.exif_transpose(image)  # as OpenCV turns what it reads
        except Exception as error:  # Pillow reads the pixels of a file only now, and may not be able to
            raise DataError(f"{name} cannot be read: {reason_of(error)}; copy its file again") from error
        multiplied = image.format == "TIFF" and image.mode == "RGBA"
        image = _rgb(turned, name, multiplied=multiplied) if in_colour else np.asarray(turned)
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or 0 in image.shape:
        what = f"an array {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise DataError(f"{name} is {what}; give a path, a PIL image, or an array (h, w, 3) uint8 of RGB")
    if not in_colour:
        return image if image.dtype.type in KEPT else image.astype(np.float32)
    grey = image.ndim == 2 or image.shape[2] == 1
    if image.dtype != np.uint8 or not (grey or image.shape[2] == 3):
        raise DataError(
            f"{name} is an array {image.shape} of {image.dtype}; this model was trained on 8-bit images in "
            "colour: give (h, w, 3) uint8 of RGB"
        )
    colour = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2) if grey else image[..., ::-1]
    return np.ascontiguousarray(colour)


def _rgb(image: Image.Image, name: str, *, multiplied: bool) -> np.ndarray:
    """(h, w, 3) uint8 RGB, or (h, w) uint8 of grey. Of 16 bits the upper 8, as OpenCV reads a file of them; Pillow cuts
    off at 255. multiplied: by alpha, as OpenCV reads TIFFs with alpha, and no other format. Raises DataError for 32
    bits, which OpenCV does not read in colour."""
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{name} has values of 32 bits (Pillow's mode {image.mode}); this model was trained on 8-bit images in "
            "colour: scale them to 0 to 255, and give an array (h, w, 3) uint8 of RGB"
        )
    if multiplied:
        values = np.asarray(image).astype(np.uint16)
        return ((values[..., :3] * values[..., 3:] + 127) // 255).astype(np.uint8)  # as libtiff rounds
    return np.asarray(image.convert("RGB"))


def as_loaded(results: dict[str, Any], as_float: bool, *, raster: bool) -> dict[str, Any]:
    """What mmseg's LoadImageFromFile adds to the results, or `LoadRaster` does, of an image that is there already."""
    info = results["img_info"]
    image = info["pixels"].astype(np.float32) if as_float else info["pixels"]
    image = image[..., None] if raster and image.ndim == 2 else image
    channels = 1 if image.ndim == 2 else image.shape[2]
    shown = {"shown_channels": (0, 1, 2) if channels >= 3 else (0,)} if raster else {}
    return (
        results
        | shown
        | {
            "filename": info["filename"],
            "ori_filename": info["filename"],
            "img": image.copy(),
            "img_shape": image.shape,
            "ori_shape": image.shape,
            "pad_shape": image.shape,
            "scale_factor": 1.0,
            "img_norm_cfg": {
                "mean": np.zeros(channels, np.float32),
                "std": np.ones(channels, np.float32),
                "to_rgb": False,
            },
        }
    )


def picture(dataset: Any, index: int) -> np.ndarray:
    """An image of an mmseg data set, or of `ImageFiles`, to look at: (h, w, 3) uint8 BGR, as its pipeline
    loads it.

    Of other than 8-bit images with 3 channels, the first three channels (or the only one), stretched from
    their least to their largest value. Of a raster, those that the file calls red, green and blue, or else the
    first three in that order (or the first).
    """
    return picture_of(loaded(dataset, index))


def loaded(dataset: Any, index: int) -> dict[str, Any]:
    """mmseg's results of an image behind the step of its pipeline that loads it."""
    results: dict[str, Any] = {
        "img_info": dataset.img_infos[index],
        "ann_info": dataset.img_infos[index].get("ann"),
    }
    dataset.pre_pipeline(results)
    for step in dataset.pipeline.transforms:
        results = step(results)
        if "img" in results:
            break
    return results


def picture_of(results: Mapping[str, Any]) -> np.ndarray:
    """As `picture`, of what `loaded` returns."""
    image = results["img"]
    image = image[..., None] if image.ndim == 2 else image
    if "shown_channels" in results:
        image = image[..., results["shown_channels"][::-1]]  # as BGR
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
