"""Label maps: from the numbers in a file to classes, in one way for training and for scores, at any number of
classes.

In: a file with a whole number for each pixel. Out: (h, w), the class of each pixel, or the data set's
`ignore_index`.
"""

import os
from typing import Any

import mmcv
import numpy as np
from mmseg.datasets import CustomDataset
from mmseg.datasets.pipelines import LoadAnnotations

from internseg_ds.data.folders.codes import ColourCodes, NumberCodes
from internseg_ds.data.orientation import turned_against
from internseg_ds.data.rasters.label_windows import colours_in, numbers_in
from internseg_ds.data.rasters.loading import raster_loader
from internseg_ds.data.rasters.windows import Window, window_of
from internseg_ds.errors import ConfigError, DataError, reason_of, shortened

NONE_IN_FILES = (-1, 65535)
"""Numbers beside `ignore_index` that files use for "no class"; in eight bits both are 255."""


class LoadLabelMap(LoadAnnotations):
    """mmseg's `LoadAnnotations` for the label maps of one data set, without what that one loses.

    - mmseg rounds all numbers into uint8 first, where 256 becomes 0 and 0.5 becomes 0; here they are read as
      they are, and those that are no whole numbers are an error.
    - mmseg applies the data set's `classes` (its `label_map`) before zero is reduced, which shifts them by
      one; here after it.
    - with raster=True it reads with rasterio, and where the image is a window of a scene, that window alone.
    - a pixel without a class gets the data set's `ignore_index`, and the result is as wide as classes and
      `ignore_index` need.
    """

    file_client: Any

    def __init__(
        self,
        loader: LoadAnnotations,
        classes: int,
        ignore_index: int,
        *,
        reduce_zero_label: bool,
        strict: bool,
        codes: NumberCodes | ColourCodes | None = None,
        raster: bool = False,
    ) -> None:
        """loader: mmseg's, whose ways of reading files are kept. classes: how many the data set has. strict:
        a number that stands for no class, and not for "none" either, raises DataError; otherwise it becomes
        `self.stranger`, as the metrics count it. codes: what the numbers or colours in files stand for, where
        they are not the classes' own numbers. raster: read with rasterio.

        Raises ConfigError where class 255 and "none" would be the same.
        """
        super().__init__(reduce_zero_label, loader.file_client_args, loader.imdecode_backend)
        if classes > 255 and ignore_index == 255:
            raise ConfigError(
                f"ignore_index=255 is a class of a data set with {classes} classes; set another (65535 is "
                "usual) for the data set, "
                "the heads (decode_head.ignore_index and its losses) and Pad.seg_pad_val"
            )
        self.classes, self.ignore_index, self.strict, self.codes = classes, ignore_index, strict, codes
        self.raster = raster
        self.stranger = classes + (classes == ignore_index)
        self.dtype = np.promote_types(np.min_scalar_type(self.stranger), np.min_scalar_type(ignore_index))

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds gt_semantic_seg (h, w). Raises DataError naming the file and what is wrong with it."""
        file = os.path.join(results.get("seg_prefix") or "", results["ann_info"]["seg_map"])
        raw = self.read(file, window_of(results))
        labels = self.to_classes(raw, results.get("label_map"))
        if self.strict and (strange := labels == self.stranger).any():
            last = self.in_file(results.get("label_map")) - 1
            raise DataError(
                f"label map {file} has label {raw[strange][0]}, but there are classes "
                f"{int(self.reduce_zero_label)} to {last} and "
                f"{self.ignore_index} for "
                f"none{' (0 too: reduce_zero_label)' if self.reduce_zero_label else ''}; "
                "correct it, or set reduce_zero_label of LoadAnnotations and of the data sets as the data "
                "need it"
            )
        results["gt_semantic_seg"] = labels
        results["seg_fields"].append("gt_semantic_seg")
        return results

    def read(self, file: str, window: Window | None = None) -> np.ndarray:
        """The numbers in a file (h, w), of any whole type; those of classes, where it is coded otherwise. window: of a
        raster, the part that is read. Raises DataError."""
        if self.raster:
            return self._read_raster(file, window)
        if self.file_client is None:
            self.file_client = mmcv.FileClient(**self.file_client_args)
        data = self.file_client.get(file)
        if isinstance(self.codes, ColourCodes):
            return self.codes.classes_in(data, file)
        raw = mmcv.imfrombytes(data, flag="unchanged", backend=self.imdecode_backend)
        raw = self._whole_numbers(raw, file)
        return raw if self.codes is None else self.codes.classes_in(raw, file)

    def _read_raster(self, file: str, window: Window | None) -> np.ndarray:
        if isinstance(self.codes, ColourCodes):
            return self.codes.classes_of(colours_in(file, window), file)
        raw = self._whole_numbers(numbers_in(file, window), file)
        return raw if self.codes is None else self.codes.classes_in(raw, file)

    def _whole_numbers(self, raw: np.ndarray, file: str) -> np.ndarray:
        if raw.ndim == 3 and raw.shape[2] == 1:
            raw = raw[..., 0]
        if raw.ndim != 2:
            raise DataError(
                f"label map {file} is {' x '.join(map(str, raw.shape))}: a picture with {raw.shape[-1]} "
                "numbers for each pixel, "
                f"where one is wanted, that of its class{_about_channels(raw)}"
            )
        if raw.dtype == bool:
            return raw.astype(np.uint8)
        if raw.dtype.kind == "f":
            whole = np.isfinite(raw) & (raw == np.round(raw))
            if not whole.all():
                raise DataError(
                    f"label map {file} has the value {raw[~whole][0]:g}, which is no whole number and so "
                    "no class; "
                    "was it resized, or scaled to 0..1?"
                )
            return raw.astype(np.int64)
        return raw

    def in_file(self, label_map: dict[int, int] | None) -> int:
        """How many numbers of a file stand for something: its classes, and 0 for none where zero is
        reduced."""
        return (self.classes if label_map is None else len(label_map)) + self.reduce_zero_label

    def to_classes(self, raw: np.ndarray, label_map: dict[int, int] | None) -> np.ndarray:
        """The classes of a file's numbers. label_map: old number -> new one, -1 for none, of a data set with
        `classes` of its own."""
        table = (
            np.arange(self.classes)
            if label_map is None
            else np.array([label_map[old] for old in range(len(label_map))])
        )
        table = np.where(table < 0, self.ignore_index, table)
        if self.reduce_zero_label:
            table = np.concatenate([[self.ignore_index], table])
        if raw.dtype == np.uint8:
            return self._looked_up(np.arange(256), table)[raw]
        return self._looked_up(raw.astype(np.int64, copy=False), table)

    def _looked_up(self, raw: np.ndarray, table: np.ndarray) -> np.ndarray:
        known = (raw >= 0) & (raw < len(table))
        labels = np.where(known, table[np.where(known, raw, 0)], self.stranger)
        labels[~known & np.isin(raw, (self.ignore_index, *NONE_IN_FILES))] = self.ignore_index
        return labels.astype(self.dtype)


def why_unreadable(file: str, error: Exception) -> str:
    """What a file has that a decoder gave up on."""
    if os.path.isfile(file) and not os.path.getsize(file):
        return "it is empty"
    return reason_of(error).replace("cannot identify image file", "no picture").partition(" <_io")[0]


def _about_channels(raw: np.ndarray) -> str:
    """What the channels of a picture (h, w, channels) hold that should be a label map: the end of a message."""
    colours, alpha = raw[..., :-1], np.unique(raw[..., -1])
    if raw.shape[-1] not in (2, 4):
        return "; turn its colours into numbers of classes"
    if alpha.size > 1 and (colours == colours[0, 0]).all():
        return (
            f". Its last channel, alpha, holds {shortened(list(map(str, alpha)), 4)}, and the others the same "
            f"everywhere ({', '.join(map(str, colours[0, 0]))}): if alpha tells the classes apart, save that channel "
            "alone"
        )
    hides = f", which holds {shortened(list(map(str, alpha)), 4)}" if alpha.size > 1 else ""
    if (colours == colours[..., :1]).all():
        return f". Its last channel is alpha{hides}; save the first one alone, which holds the numbers"
    return f". Its last channel is alpha{hides}; turn its colours into numbers of classes"


def read_label_maps_of(dataset: CustomDataset) -> None:
    """Has `dataset`, mmseg's, read its label maps in our way: in its pipeline, and for its scores. Loaders of
    the user's own are left as they are.

    Raises ConfigError where class 255 and "none" would be the same.
    """
    transforms, codes = dataset.pipeline.transforms, getattr(dataset, "label_codes", None)
    raster = raster_loader(transforms) is not None
    for place, transform in enumerate(transforms):
        if type(transform) is LoadAnnotations:
            transforms[place] = LoadLabelMap(
                transform,
                len(dataset.CLASSES),
                dataset.ignore_index,
                reduce_zero_label=transform.reduce_zero_label,
                strict=True,
                codes=codes,
                raster=raster,
            )
    theirs = dataset.gt_seg_map_loader
    if (
        type(theirs) is LoadAnnotations
        and type(dataset).get_gt_seg_map_by_idx is CustomDataset.get_gt_seg_map_by_idx
    ):
        reduce_zero_label = dataset.reduce_zero_label or theirs.reduce_zero_label
        dataset.gt_seg_map_loader = LoadLabelMap(
            theirs,
            len(dataset.CLASSES),
            dataset.ignore_index,
            reduce_zero_label=reduce_zero_label,
            strict=False,
            codes=codes,
            raster=raster,
        )


def loader_in(dataset: CustomDataset) -> LoadLabelMap | None:
    """Our loader in the pipeline of a data set; None where there is none, or one of the user's own."""
    return next((step for step in dataset.pipeline.transforms if isinstance(step, LoadLabelMap)), None)


def annotation_of(dataset: CustomDataset, index: int) -> dict[str, Any]:
    """What a loader takes of an image's label map: mmseg's results before the first step."""
    results: dict[str, Any] = {"ann_info": dataset.get_ann_info(index)}
    dataset.pre_pipeline(results)
    return results


def ground_truth(dataset: CustomDataset, index: int) -> np.ndarray:
    """Classes (h, w) of an image, as the metrics take them: `ignore_index` stands for none. Raises DataError
    naming the file."""
    try:
        labels = dataset.get_gt_seg_map_by_idx(index)
    except DataError:
        raise
    except Exception as error:  # whatever a loader of theirs or OpenCV says
        file = os.path.join(dataset.ann_dir or "", dataset.img_infos[index]["ann"]["seg_map"])
        raise DataError(
            f"label map {file} cannot be read: {why_unreadable(file, error)}; copy it again"
        ) from error
    # mmseg leaves it to its metrics
    if dataset.reduce_zero_label and not isinstance(dataset.gt_seg_map_loader, LoadLabelMap):
        labels = np.where(labels == 0, 255, labels - 1).astype(np.uint8)
        labels[labels == 254] = 255
    # torch hardly computes in unsigned types
    return labels if labels.dtype == np.uint8 else labels.astype(np.int32)


class CheckAnnotation:
    """Stands behind any LoadAnnotations, whoever wrote it: raises DataError, naming the file, unless there is
    one class, or `ignore_index`, for each pixel."""

    def __init__(self, classes: int, ignore_index: int = 255) -> None:
        self.classes, self.ignore_index = classes, ignore_index

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        labels, image = results["gt_semantic_seg"], results["img"]
        file = os.path.join(results.get("seg_prefix") or "", results["ann_info"]["seg_map"])
        if labels.shape != image.shape[:2]:
            raise DataError(
                f"label map {file} has {' x '.join(map(str, labels.shape))} pixels and its image "
                f"{' x '.join(map(str, image.shape[:2]))}; "
                "it must have one class per "
                f"pixel{turned_against(results.get('filename', ''), labels.shape, image.shape)}"
            )
        wrong = labels[((labels < 0) | (labels >= self.classes)) & (labels != self.ignore_index)]
        if wrong.size:
            raise DataError(
                f"label map {file} has label {int(wrong[0])}, but there are classes 0 to "
                f"{self.classes - 1} and {self.ignore_index} for none; "
                "correct it, or set reduce_zero_label of LoadAnnotations as the data need it"
            )
        return results
