"""mmseg's data sets, built from config entries and looked at before anything runs on them: folders, label
maps, and single images through their pipeline.

In: a `data.train` or `data.val` entry. Out: mmseg's data set, whose training pipeline also looks at each
label map; or a DataError that names the file at fault, and the fix.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from mmcv import FileClient
from mmcv.fileio.file_client import HardDiskBackend
from mmseg.datasets import DATASETS, PIPELINES, CustomDataset, RepeatDataset, build_dataset
from mmseg.datasets.pipelines import LoadAnnotations

import internseg_ds.data.ade20k
import internseg_ds.data.published
import internseg_ds.data.transforms  # noqa: F401 - registers those that published configs name
from internseg_ds.data.checks.pipeline_steps import check_steps
from internseg_ds.data.class_balance import ClassBalancedDataset
from internseg_ds.data.joined import joining
from internseg_ds.data.label_maps import CheckAnnotation, read_label_maps_of
from internseg_ds.data.other_endings import instead_of, there_are
from internseg_ds.data.palettes import check_decoder
from internseg_ds.errors import DataError, UserError, are, counted, nearest_argument, reason_of, shortened

SegmentationDataset: TypeAlias = Any
"""One of mmseg's data sets, or a wrapper around some of them: `len`, `[index]` for the results of its
pipeline, CLASSES and PALETTE. mmseg has no types, and its data sets may be of anybody's classes."""


def build_datasets(entry: Any, what: str, leaves: list[Any], **default_args: Any) -> SegmentationDataset:
    """mmseg's data set of a config entry, after a look at its folders.

    what: its name in messages ("data.train"). leaves: the plain data sets inside wrappers. Raises DataError
    when a folder or a label map is missing, the set or a part of it is empty, or its parts have different
    classes; ConfigError when a step of its pipeline cannot be meant, or its folders cannot be paired.
    """
    _check_folders(leaves, what)
    dataset = _built(joining(entry, what), what, default_args)
    for part in plain_parts(dataset):
        _check_kind(part, what)
        _read_in_our_way(part)
    for wrapper in _wrappers(dataset):
        _update_wrapper(wrapper, what)
    for transforms in pipelines(dataset):
        check_steps(transforms, what, evaluates=bool(default_args.get("test_mode")))
    if len({tuple(getattr(part, "CLASSES", None) or ()) for part in plain_parts(dataset)}) > 1:
        raise DataError(
            f"{what} joins data sets whose classes have other names or another order, but a label must "
            "mean one class; give all the same classes=(...)"
        )
    for part in plain_parts(dataset):
        _check_files(part, what)
    _check_not_empty(dataset, what, leaves)
    for part in plain_parts(dataset):
        if isinstance(part, CustomDataset):
            check_decoder(part, what)
    return dataset


def _check_folders(leaves: list[Any], what: str) -> None:
    for leaf in leaves:
        for key in ("img_dir", "ann_dir"):
            folders = leaf.get(key) or []
            # a data set for each of several folders
            for folder in folders if isinstance(folders, (list, tuple)) else [folders]:
                _check_folder(leaf.get("data_root"), key, folder, what)


def _check_folder(root: str | None, key: str, folder: str, what: str) -> None:
    """Raises DataError for a folder that is not there, which says whether `data_root` is wrong or what stands
    below it.

    root: `data_root`. key: img_dir or ann_dir, whose value is `folder`.
    """
    path = Path(root or "", folder)
    if path.is_dir():
        return
    if not root or Path(folder).is_absolute():
        reason = f"({key} = {folder!r}); put the data there, or set {what}.{key}"
    elif not Path(root).is_dir():
        reason = (
            f"({key} = {folder!r} under data_root = {root!r}), for there is no folder {root!r} either; "
            f"put the data there, or set {what}.data_root"
        )
    else:
        there = shortened(sorted(item.name for item in Path(root).iterdir())) or "nothing"
        reason = (
            f"(data_root = {root!r} is there, {key} = {folder!r} under it is not: it holds {there}); set "
            f"{what}.{key}, or {what}.data_root if that is not the folder you mean"
        )
    raise DataError(f"{what}: there is no folder {path} {reason}")


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
    if _lists_files_as_mmseg(part):
        if part.split is not None:
            _read_split(part)
        elif part.ann_dir is not None:
            _pair_by_endings(part)
    if part.CLASSES is not None:
        read_label_maps_of(part)
        _check_annotations_of(part)
        for step in part.pipeline.transforms:
            if hasattr(step, "CLASSES"):  # from there on labels mean something else
                part.CLASSES, part.PALETTE = step.CLASSES, step.PALETTE


def _update_wrapper(wrapper: SegmentationDataset, what: str) -> None:
    """Gives a wrapper the classes that its first data set has by now. Raises DataError for a repetition that
    leaves no image."""
    if isinstance(wrapper, RepeatDataset) and len(wrapper) == 0:
        raise DataError(
            f"{what} repeats a data set {wrapper.times} times, so none of its images is ever drawn; "
            "set times to 1 or more, or leave it out"
        )
    first = next(plain_parts(wrapper))
    if wrapper is not first and hasattr(first, "CLASSES"):
        wrapper.CLASSES, wrapper.PALETTE = first.CLASSES, first.PALETTE
    if isinstance(wrapper, ClassBalancedDataset):
        wrapper.balance()


def _check_not_empty(dataset: SegmentationDataset, what: str, leaves: list[Any]) -> None:
    """Raises DataError where there is no image, in all or in one of several data sets."""
    if len(dataset) == 0:
        places = ", ".join(
            f"{leaf.get('data_root')}/{leaf.get('img_dir')}/*{leaf.get('img_suffix', '.jpg')}"
            for leaf in leaves
        )
        raise DataError(
            f"{what} is empty: no image matches {places}{_what_is_there(next(plain_parts(dataset)))}"
        )
    for part in plain_parts(dataset):
        if len(part) == 0:
            there = _what_is_there(part) or "; put some there, or leave it out"
            raise DataError(f"{what} joins several data sets, and that of {part.img_dir} has no image{there}")


def _lists_files_as_mmseg(part: SegmentationDataset) -> bool:
    return isinstance(part, CustomDataset) and type(part).load_annotations is CustomDataset.load_annotations


def _what_is_there(part: SegmentationDataset) -> str:
    """What stands in the folder of a data set that takes none of it, as the end of an error message."""
    if not _lists_files_as_mmseg(part) or part.split is not None or not os.path.isdir(part.img_dir):
        return ""
    return there_are(part.img_dir, part.img_suffix, "img_suffix")


def _wrappers(dataset: SegmentationDataset) -> Iterator[SegmentationDataset]:
    """The data set and all those inside it."""
    yield dataset
    for inner in (
        *getattr(dataset, "datasets", ()),
        *([dataset.dataset] if hasattr(dataset, "dataset") else []),
    ):
        yield from _wrappers(inner)


def parts(dataset: SegmentationDataset) -> Iterator[SegmentationDataset]:
    """The data sets that a concatenation strings together, each with all that happens to its images; the data
    set itself where it is no concatenation."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from parts(part)
    elif isinstance(dataset, RepeatDataset):
        yield from parts(dataset.dataset)
    else:
        yield dataset


def plain_parts(dataset: SegmentationDataset) -> Iterator[SegmentationDataset]:
    """The data sets inside wrappers (`MultiImageMixDataset` too), in their order."""
    for part in parts(dataset):
        if hasattr(part, "dataset"):
            yield from plain_parts(part.dataset)
        else:
            yield part


def pipelines(dataset: SegmentationDataset) -> Iterator[list[Any]]:
    """All that happens to the images of each plain data set, the steps of its wrappers included."""
    for part in parts(dataset):
        if hasattr(part, "dataset"):
            yield from ([*steps, *getattr(part, "pipeline", ())] for steps in pipelines(part.dataset))
        else:
            yield part.pipeline.transforms


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


def _check_files(part: SegmentationDataset, what: str) -> None:
    """Each image of a split file and each image's label map must exist: looked for now, lest a run end at the
    first one that does not. Raises DataError."""
    if not isinstance(getattr(part, "file_client", None), FileClient) or not isinstance(
        part.file_client.client, HardDiskBackend
    ):
        return
    if part.split is not None:
        _check_images(part, what)
    if part.ann_dir is None:
        return
    names = [info["ann"]["seg_map"] for info in part.img_infos if "ann" in info]
    if missing := _missing(part.ann_dir, names):
        raise DataError(
            f"{what}: {len(missing)} of {counted(len(names), 'label map')} "
            f"{are(len(missing))} missing, the first is "
            f"{missing[0]}{instead_of(missing[0])}; put them there, or take their images away"
        )


def _check_images(part: SegmentationDataset, what: str) -> None:
    """Those that a split file names."""
    names = [info["filename"] for info in part.img_infos]
    missing = _missing(part.img_dir, names)
    if not missing:
        return
    why = instead_of(missing[0])
    if missing[0].endswith(2 * part.img_suffix):
        why = f"; its lines end in {part.img_suffix} already, which img_suffix adds once more"
    raise DataError(
        f"{what}: {len(missing)} of {counted(len(names), 'image')} of the split file {part.split} "
        f"{are(len(missing))} missing, "
        f"the first is {missing[0]}{why}; put them there, or take their lines out"
    )


def _missing(folder: str, names: list[str]) -> list[str]:
    files = [os.path.join(folder, name) for name in names]
    return [file for file in files if not os.path.exists(file)]


def first_sample(dataset: SegmentationDataset, what: str, *, tolerated: int = 0) -> dict[str, Any]:
    """The first image of a data set that passes its pipeline; before it, at most `tolerated` may fail. Raises
    DataError with the message of the first that did."""
    first: DataError | None = None
    for index in range(min(tolerated + 1, len(dataset))):
        try:
            return sample(dataset, index)
        except DataError as error:
            first = first or error
    raise DataError(f"{what}: {first}") from first


def sample(dataset: SegmentationDataset, index: int) -> dict[str, Any]:
    """One image through its pipeline. Raises DataError naming the file that is at fault, or the image and the
    message of whichever transform refused."""
    try:
        return dataset[index]
    except DataError:
        raise
    except Exception as error:  # transforms are anybody's code
        image, labels = _files(dataset, index)
        for file in filter(None, (image, labels)):
            if not _is_picture(file):
                what = "is no picture that can be read" if os.path.exists(file) else "is not there"
                raise DataError(f"{file} {what}; copy it again, or take the image away") from error
        if _to_nothing(error) and (size := _size_of(image)) is not None:
            raise DataError(
                f"image {image} of {size[0]} x {size[1]} pixels (height x width) cannot be resized: a side "
                "of it would have no pixel left; "
                "take it away, or cut it into pieces that are less narrow"
            ) from error
        hint = "is the image, or its label map, damaged?"
        if isinstance(error, KeyError):
            hint = "does a step of the pipeline make it, before the one that asks for it?"
        raise DataError(f"the pipeline fails on image {image}: {reason_of(error)}; {hint}") from error


def _is_picture(file: str) -> bool:
    try:
        return cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED) is not None
    except (OSError, cv2.error):  # of an empty file
        return False


def _to_nothing(error: Exception) -> bool:
    """Whether OpenCV was to make a picture of no width or no height."""
    return (
        isinstance(error, cv2.error)
        and getattr(error, "func", None) == "resize"
        and any(word in str(error) for word in ("inv_scale", "dsize"))
    )


def _size_of(file: str) -> tuple[int, int] | None:
    image = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED) if os.path.isfile(file) else None
    return None if image is None else image.shape[:2]


def _files(dataset: SegmentationDataset, index: int) -> tuple[str, str | None]:
    """Image and label map of an entry, inside wrappers too."""
    if isinstance(dataset, ClassBalancedDataset):
        return _files(dataset.dataset, dataset.indices[index])
    if hasattr(dataset, "dataset"):  # RepeatDataset
        return _files(dataset.dataset, index % len(dataset.dataset))
    for part in getattr(dataset, "datasets", ()):
        if index < len(part):
            return _files(part, index)
        index -= len(part)
    info = dataset.img_infos[index]
    labels = (
        os.path.join(dataset.ann_dir, info["ann"]["seg_map"])
        if getattr(dataset, "ann_dir", None) and "ann" in info
        else None
    )
    return os.path.join(getattr(dataset, "img_dir", None) or "", info["filename"]), labels
