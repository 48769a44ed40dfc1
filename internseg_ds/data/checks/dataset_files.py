"""The folders and files of a data set, looked for before anything reads them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcv import FileClient
from mmcv.fileio.file_client import HardDiskBackend
from mmseg.datasets import CustomDataset

from internseg_ds.data.checks.other_endings import instead_of, there_are
from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.errors import DataError, are, counted, shortened


def check_folders(leaves: list[Any], what: str) -> None:
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


def check_files(part: SegmentationDataset, what: str) -> None:
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
    return [file for file in files if not os.path.exists(file) or os.path.isdir(file)]


def check_not_empty(
    dataset: SegmentationDataset, parts: Sequence[SegmentationDataset], what: str, leaves: list[Any]
) -> None:
    """Raises DataError where there is no image, in all or in one of several data sets.

    parts: the plain data sets inside `dataset`. leaves: their entries in the config.
    """
    if len(dataset) == 0:
        places = ", ".join(
            f"{leaf.get('data_root')}/{leaf.get('img_dir')}/*{leaf.get('img_suffix', '.jpg')}"
            for leaf in leaves
        )
        raise DataError(f"{what} is empty: no image matches {places}{_what_is_there(parts[0])}")
    for part in parts:
        if len(part) == 0:
            there = _what_is_there(part) or "; put some there, or leave it out"
            raise DataError(f"{what} joins several data sets, and that of {part.img_dir} has no image{there}")


def _what_is_there(part: SegmentationDataset) -> str:
    """What stands in the folder of a data set that takes none of it, as the end of an error message."""
    if not lists_files_as_mmseg(part) or part.split is not None or not os.path.isdir(part.img_dir):
        return ""
    return there_are(part.img_dir, part.img_suffix, "img_suffix")


def lists_files_as_mmseg(part: SegmentationDataset) -> bool:
    return isinstance(part, CustomDataset) and type(part).load_annotations is CustomDataset.load_annotations
