"""mmseg's data sets, built from config entries and looked at before anything runs on them.

In: a `data.train` or `data.val` entry. Out: mmseg's data set, whose training pipeline also looks at each
label map; or a DataError that names the file at fault, and the fix.
"""

import os
from typing import Any

from mmseg.datasets import DATASETS, PIPELINES, CustomDataset, build_dataset
from mmseg.datasets.pipelines import LoadAnnotations

import internseg_ds.data.ade20k
import internseg_ds.data.folders.dataset
import internseg_ds.data.published
import internseg_ds.data.transforms  # noqa: F401 - registers those that published configs name
from internseg_ds.data.checks.dataset_files import (
    check_files,
    check_folders,
    check_not_empty,
    lists_files_as_mmseg,
)
from internseg_ds.data.checks.pipeline_steps import check_steps
from internseg_ds.data.class_balance import ClassBalancedDataset
from internseg_ds.data.dataset_parts import SegmentationDataset, pipelines, plain_parts, wrappers
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.data.joined import joining
from internseg_ds.data.label_maps import CheckAnnotation, read_label_maps_of
from internseg_ds.data.palettes import check_decoder
from internseg_ds.data.rasters.image_check import check_images_of
from internseg_ds.data.rasters.scenes import cut_into_tiles
from internseg_ds.errors import DataError, UserError, nearest_argument, reason_of


def build_datasets(entry: Any, what: str, **default_args: Any) -> SegmentationDataset:
    """mmseg's data set of a config entry, after a look at its folders.

    what: its name in messages ("data.train"). Raises DataError when a folder or a label map is missing, the
    set or a part of it is empty, or its parts have different classes; ConfigError when a step of its pipeline
    cannot be meant, or its folders cannot be paired.
    """
    dataset = assembled_datasets(entry, what, **default_args)
    plain = list(plain_parts(dataset))
    for part in plain:
        check_files(part, what)
    check_not_empty(dataset, plain, what, list(leaf_datasets(entry)))
    for part in plain:
        if isinstance(part, CustomDataset):
            check_decoder(part, what)
    return dataset


def assembled_datasets(entry: Any, what: str, **default_args: Any) -> SegmentationDataset:
    """As `build_datasets`, without a look at the files: images or label maps may be missing, or all."""
    check_folders(list(leaf_datasets(entry)), what)
    dataset = _built(joining(entry, what), what, default_args)
    plain = list(plain_parts(dataset))
    for part in plain:
        _check_kind(part, what)
        _read_in_our_way(part)
    for wrapper in wrappers(dataset):
        _update_wrapper(wrapper)
    for transforms in pipelines(dataset):
        check_steps(transforms, what, evaluates=bool(default_args.get("test_mode")))
    if len({tuple(getattr(part, "CLASSES", None) or ()) for part in plain}) > 1:
        raise DataError(
            f"{what} joins data sets whose classes have other names or another order, but a label must "
            "mean one class; give all the same classes=(...)"
        )
    return dataset


def _built(entry: Any, what: str, default_args: dict[str, Any]) -> SegmentationDataset:
    try:
        return build_dataset(entry, default_args or None)
    except UserError:
        raise
    except Exception as error:  # whatever somebody's data set refuses with
        hint = nearest_argument(error, PIPELINES.module_dict | DATASETS.module_dict)
        raise DataError(f"{what} cannot be built: {reason_of(error)}{hint}") from error


def _check_kind(part: SegmentationDataset, what: str) -> None:
    """Raises DataError for a plain data set that is none of mmseg's kind, and for one that leaves out classes
    whose pixels would count as another class."""
    if lacks := [name for name in ("pipeline", "CLASSES", "img_infos") if not hasattr(part, name)]:
        raise DataError(
            f"{what}: {type(part).__name__} is no data set of mmseg, it lacks {', '.join(lacks)}; "
            "derive it from mmseg.datasets.CustomDataset, and fill img_infos in its load_annotations"
        )
    if odd := [name for name in part.CLASSES or () if not isinstance(name, str)]:
        raise DataError(
            f"{what}.classes has {odd[0]!r}, which is no name; names of classes are strings, such as {str(odd[0])!r}"
        )
    if not _is_whole(getattr(part, "ignore_index", 255)):
        raise DataError(
            f"{what}.ignore_index={part.ignore_index!r} must be a whole number, the label of pixels that do not count"
        )
    left_out = -1 in (getattr(part, "label_map", None) or {}).values()
    if left_out and 0 <= part.ignore_index < len(part.CLASSES):
        raise DataError(
            f"{what} leaves classes out, and ignore_index={part.ignore_index} is one of those it keeps "
            f"({part.CLASSES[part.ignore_index]}), so their pixels would count as that; leave ignore_index "
            "at 255, or at another number that is no class"
        )


def _read_in_our_way(part: SegmentationDataset) -> None:
    """Corrects what mmseg reads otherwise than a user means it: classes that are left out, names of files,
    and label maps."""
    # of classes that the config leaves out; mmseg's -1 is no uint8, which numpy 2 minds
    if getattr(part, "label_map", None):
        part.label_map = {old: part.ignore_index if new == -1 else new for old, new in part.label_map.items()}
    if not isinstance(part, CustomDataset):
        return
    check_images_of(part.pipeline.transforms)
    if lists_files_as_mmseg(part):
        if part.split is not None:
            _read_split(part)
        elif part.ann_dir is not None:
            _pair_by_endings(part)
    cut_into_tiles(part)
    if part.CLASSES is not None:
        read_label_maps_of(part)
        _check_annotations_of(part)
        for step in part.pipeline.transforms:
            if hasattr(step, "CLASSES"):  # from there on labels mean something else
                part.CLASSES, part.PALETTE = step.CLASSES, step.PALETTE


def _update_wrapper(wrapper: SegmentationDataset) -> None:
    """Gives a wrapper the classes that its first data set has by now."""
    first = next(plain_parts(wrapper))
    if wrapper is not first and hasattr(first, "CLASSES"):
        wrapper.CLASSES, wrapper.PALETTE = first.CLASSES, first.PALETTE
    if isinstance(wrapper, ClassBalancedDataset):
        wrapper.balance()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_annotations_of(dataset: SegmentationDataset) -> None:
    """Has each label map that the pipeline loads looked at, before anything is done to it."""
    transforms = dataset.pipeline.transforms
    for place, transform in reversed(list(enumerate(transforms))):
        if isinstance(transform, LoadAnnotations):
            transforms.insert(place + 1, CheckAnnotation(len(dataset.CLASSES), dataset.ignore_index))


def _pair_by_endings(part: CustomDataset) -> None:
    """mmseg replaces the ending of an image wherever it stands in the name, in that of a folder too: where no
    label map is called so, the ending alone."""
    for info in part.img_infos:
        if info["filename"].count(part.img_suffix) > 1:
            by_ending = info["filename"].removesuffix(part.img_suffix) + part.seg_map_suffix
            if not os.path.exists(os.path.join(part.ann_dir, info["ann"]["seg_map"])) and os.path.exists(
                os.path.join(part.ann_dir, by_ending)
            ):
                info["ann"] = {"seg_map": by_ending}


def _read_split(part: CustomDataset) -> None:
    """mmseg takes each line of a split file for the name of an image, an empty one and a byte-order mark
    too."""
    infos = []
    for info in part.img_infos:
        if stem := info["filename"].removesuffix(part.img_suffix).lstrip("\ufeff").strip():
            infos.append(
                {
                    **info,
                    "filename": stem + part.img_suffix,
                    **({"ann": {"seg_map": stem + part.seg_map_suffix}} if "ann" in info else {}),
                }
            )
    part.img_infos = infos
