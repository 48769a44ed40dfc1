"""`FolderDataset`: anybody's images and label maps, as they lie in their folders.

Importing this module registers it in mmseg's DATASETS.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import mmcv
import numpy as np
from mmseg.datasets import DATASETS, CustomDataset

from internseg_ds.data.folders.codes import ColourCodes, NumberCodes, colour_codes, number_codes, palette_of
from internseg_ds.data.folders.pairs import Pair, paired
from internseg_ds.data.folders.subsets import drawn, drawn_per_class, named_in, on_side
from internseg_ds.data.label_maps import annotation_of, loader_in, read_label_maps_of
from internseg_ds.errors import ConfigError

BACKGROUND = "background"
VALIDATION_SHARE = 0.1
"""Of the images of one folder, unless the config says otherwise."""


@DATASETS.register_module()
class FolderDataset(CustomDataset):
    """Images and label maps found by patterns in nested folders.

    root: a folder, or several. images: pattern below it ("**/*.tif"), or several. masks: pattern of the label
    maps ("**/*_mask.png"), None where there are none; an image has the one for which the wildcards match the
    same. classes: names, or a file of them. split: a file that names the images taken, below the (first) root
    unless it is absolute. fold: "train" or "val", the side of a division of all images by a hash of their
    names; validation_share: of the latter, 0.1 unless given. label_map: {number in the files: class name,
    place or None}, or "0/255" for masks of background and one class. colours: {(R, G, B): class name, place
    or None}, or a colour for each class, of colour-coded masks. first: so many images, drawn by `seed`;
    per_class: so that each class is in so many. Others as CustomDataset has them.

    Raises ConfigError for arguments that cannot be meant, DataError where files are missing, naming the nearest.
    """

    img_infos: list[dict[str, Any]]

    def __init__(
        self,
        pipeline: Sequence[Any],
        root: str | Sequence[str],
        images: str | Sequence[str],
        masks: str | None = None,
        classes: str | Sequence[str] | None = None,
        *,
        split: str | None = None,
        fold: str | None = None,
        validation_share: float | None = None,
        label_map: Mapping[int, Any] | str | None = None,
        colours: Mapping[Any, Any] | Sequence[Any] | None = None,
        palette: Any = None,
        ignore_index: int = 255,
        first: int | None = None,
        per_class: int | None = None,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        _check_texts(several=True, root=root, images=images)
        given = {key: value for key, value in (("masks", masks), ("split", split)) if value is not None}
        _check_texts(several=False, **given)
        if classes is None:
            raise ConfigError("FolderDataset needs classes=[...], or a file with a name on each line")
        _check_texts(several=True, classes=classes)
        names = mmcv.list_from_file(classes) if isinstance(classes, str) else list(classes)
        if not names:
            raise ConfigError("classes of FolderDataset names none; it needs a name for each class")
        names = [BACKGROUND, *names] if label_map == "0/255" and len(names) == 1 else names
        self.label_codes = _codes(label_map, colours, names, ignore_index)
        if isinstance(self.label_codes, ColourCodes) and palette is None:
            palette = palette_of(self.label_codes, names)
        _check_numbers(first, per_class, seed, masks)
        _check_fold(fold, validation_share)
        self.roots = roots = [root] if isinstance(root, str) else list(root)
        self.images, self.masks = [images] if isinstance(images, str) else list(images), masks
        self.takes_all = split is None and first is None and per_class is None
        self.pairs = paired(roots, self.images, masks)
        if split is not None:
            self.pairs = named_in(os.path.join(roots[0], split), self.pairs)
        if fold is not None:
            self.pairs = on_side(
                fold, VALIDATION_SHARE if validation_share is None else validation_share, self.pairs
            )
        folder = os.path.commonpath(list(map(os.path.abspath, roots))) if len(roots) > 1 else roots[0]
        super().__init__(
            pipeline,
            folder,
            ann_dir=None if masks is None else folder,
            classes=names,
            palette=palette,
            ignore_index=ignore_index,
            **arguments,
        )
        read_label_maps_of(self)
        self._check_zero()
        if first is not None:
            self._take(drawn(len(self), first, seed))
        if per_class is not None:
            self._take(drawn_per_class(len(self), per_class, seed, self._classes_of))

    def load_annotations(self, img_dir: str, *_: Any) -> list[dict[str, Any]]:
        """The images below `img_dir`, with their label maps."""
        return [
            {
                "filename": _below(img_dir, pair, pair.image),
                **({"ann": {"seg_map": _below(img_dir, pair, pair.mask)}} if pair.mask is not None else {}),
            }
            for pair in self.pairs
        ]

    def _take(self, places: Sequence[int]) -> None:
        self.img_infos = [self.img_infos[place] for place in places]

    def _classes_of(self, index: int) -> list[int]:
        loader = loader_in(self) or self.gt_seg_map_loader
        labels = loader({**annotation_of(self, index), "seg_fields": []})["gt_semantic_seg"]
        return [label for label in np.unique(labels).tolist() if 0 <= label < len(self.CLASSES)]

    def _check_zero(self) -> None:
        """Zero is reduced, or the numbers are mapped: both would shift classes."""
        loaders = [loader_in(self), self.gt_seg_map_loader]
        if self.label_codes is not None and any(
            getattr(loader, "reduce_zero_label", False) for loader in (*loaders, self)
        ):
            raise ConfigError(
                "reduce_zero_label beside label_map or colours of FolderDataset would shift its classes; leave "
                "it out, and map what stands for no class to None"
            )


def _codes(
    label_map: Any, colours: Any, classes: Sequence[str], ignore_index: int
) -> NumberCodes | ColourCodes | None:
    if label_map is not None and colours is not None:
        raise ConfigError("FolderDataset has both label_map and colours; masks hold numbers or colours")
    if colours is not None:
        return colour_codes(colours, classes, ignore_index)
    return None if label_map is None else number_codes(label_map, classes, ignore_index)


def _check_texts(*, several: bool, **arguments: Any) -> None:
    """Each must be a string, or, if `several`, may be some of them."""
    for key, value in arguments.items():
        given = value if several and isinstance(value, (list, tuple)) else [value]
        if not given or not all(isinstance(each, str) and each for each in given):
            raise ConfigError(
                f"{key}={value!r} of FolderDataset must be a string{', or a list of strings' * several}"
            )


def _check_numbers(first: Any, per_class: Any, seed: Any, masks: str | None) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed={seed!r} of FolderDataset must be a whole number")
    for key, value in (("first", first), ("per_class", per_class)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{key}={value!r} of FolderDataset must be a whole number of at least 1")
    if first is not None and per_class is not None:
        raise ConfigError("FolderDataset takes first=N images or per_class=N, not both")
    if per_class is not None and masks is None:
        raise ConfigError("per_class of FolderDataset needs masks")


def _check_fold(fold: Any, validation_share: Any) -> None:
    if fold not in (None, "train", "val"):
        raise ConfigError(f'fold={fold!r} of FolderDataset must be "train" or "val"')
    if validation_share is None:
        return
    if fold is None:
        raise ConfigError(
            f'validation_share={validation_share!r} of FolderDataset needs fold="train" or fold="val"'
        )
    if (
        isinstance(validation_share, bool)
        or not isinstance(validation_share, (int, float))
        or not 0 < validation_share < 1
    ):
        raise ConfigError(
            f"validation_share={validation_share!r} of FolderDataset must be a number above 0 and below 1, such as 0.1"
        )


def _below(folder: str, pair: Pair, path: str) -> str:
    whole = os.path.join(pair.root, path)
    return path if pair.root == folder else os.path.relpath(whole, folder)
