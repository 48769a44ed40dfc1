"""What the folders of a data set say about it: images left out for their endings, label maps without an image,
and formats that change numbers.

In: a plain data set of mmseg. Out: findings. Reads the names of files alone.
"""

import inspect
import os
from collections.abc import Iterator, Sequence

from mmseg.datasets import CustomDataset

from internseg_ds.data.checks.dataset_files import lists_files_as_mmseg
from internseg_ds.data.checks.findings import Finding, Setting
from internseg_ds.data.checks.looks import image_file, is_lossy, label_ending, label_file
from internseg_ds.data.checks.other_endings import files_alike
from internseg_ds.data.folders.dataset import FolderDataset
from internseg_ds.data.folders.pairs import masks_without_images, other_case
from internseg_ds.errors import are, counted, shortened


def left_out(part: CustomDataset, parts: Sequence[CustomDataset], what: str) -> Iterator[Finding]:
    """Files of the image folder whose names end almost as `img_suffix` says, and that none of `parts`
    takes."""
    if isinstance(part, FolderDataset):
        yield from _left_out_by_patterns(part, parts, what)
        return
    if part.split is not None or not lists_files_as_mmseg(part) or not os.path.isdir(part.img_dir):
        return
    used = {info["filename"] for info in part.img_infos}
    others = {
        image_file(other, index)
        for other in parts
        if other is not part and other.img_dir == part.img_dir
        for index in range(len(other.img_infos))
    }
    found = [
        (path, stem)
        for path, stem in files_alike(part.img_dir, part.img_suffix)
        if os.path.join(part.img_dir, path) not in others
    ]
    if not found:
        return
    endings = sorted({path[len(stem) :] for path, stem in found})
    text = (
        f"{what}: {counted(len(found), 'file')} of {part.img_dir} {are(len(found))} left out, for the "
        f"ending is {shortened(sorted({os.path.splitext(path)[1] for path, _ in found}))} and not "
        f"img_suffix={part.img_suffix!r} "
        f"({shortened(sorted(path for path, _ in found), 2)}); {len(used)} {are(len(used))} taken"
    )
    stems = {name[: -len(part.img_suffix)] for name in used}
    labelled = part.ann_dir is not None and all(
        os.path.exists(os.path.join(part.ann_dir, stem + part.seg_map_suffix)) for _, stem in found
    )
    if labelled and not any(stem in stems for _, stem in found):
        settings = _suffix_settings(part, what, [part.img_suffix, *endings])
        yield Finding(
            "suffix",
            f"{text}. All of them have label maps, so they are meant to be there: rename them"
            f"{', or give both endings' if settings else ''}",
            wrong=True,
            settings=settings,
        )
    else:
        yield Finding("suffix", f"{text}. Rename those that are meant to be there")


def _left_out_by_patterns(
    part: FolderDataset, parts: Sequence[CustomDataset], what: str
) -> Iterator[Finding]:
    """Files that the patterns of a data set would match if case did not count."""
    taken = {os.path.abspath(image_file(other, index)) for other in parts for index in range(len(other))}
    found = [
        pair
        for pair in (other_case(part.roots, part.images, part.masks) if part.takes_all else ())
        if os.path.abspath(os.path.join(pair.root, pair.image)) not in taken
    ]
    if not found:
        return
    stems = {(pair.root, pair.stem) for pair in part.pairs}
    meant = part.masks is not None and all(
        pair.mask is not None and (pair.root, pair.stem) not in stems for pair in found
    )
    yield Finding(
        "suffix",
        f"{what}: {counted(len(found), 'file')} {are(len(found))} left out, for images={part.images!r} does not "
        f"match {shortened([os.path.join(pair.root, pair.image) for pair in found], 2)}; "
        f"{len(part)} {are(len(part))} taken. "
        + (
            "All of them have label maps, so they are meant to be there: rename them, or give a pattern for each "
            "ending in a list"
            if meant
            else "Rename those that are meant to be there"
        ),
        wrong=meant,
        settings=_pattern_settings(part, [pair.image for pair in found], what) if len(parts) == 1 else (),
    )


def _pattern_settings(part: FolderDataset, files: Sequence[str], what: str) -> tuple[Setting, ...]:
    """A pattern for each ending more."""
    own = {os.path.splitext(pattern)[1] for pattern in part.images}
    others = sorted({os.path.splitext(file)[1] for file in files})
    if own & set(others):  # names differ in something else
        return ()
    more = [os.path.splitext(pattern)[0] + ending for pattern in part.images for ending in others]
    return (Setting(what, "images", [*part.images, *dict.fromkeys(more)]),)


def lossy(part: CustomDataset, what: str) -> Iterator[Finding]:
    """Label maps in a format that changes numbers."""
    if is_lossy(part):
        yield Finding(
            "lossy-label-maps",
            f"{what}: label maps end in {label_ending(part)} and are JPEGs, which change numbers a "
            "little, so that classes become others; write them anew, as .png, from what they were made of",
        )


def label_maps_without_images(
    part: CustomDataset, parts: Sequence[CustomDataset], what: str
) -> Iterator[Finding]:
    """Label maps of a folder that is taken whole, whose images are not there, whichever of `parts` might take
    them."""
    if isinstance(part, FolderDataset):
        if part.takes_all and part.masks is not None:
            paired = {
                os.path.abspath(label_file(other, index) or "")
                for other in parts
                for index in range(len(other))
            }
            lonely = masks_without_images(part.roots, part.images, part.masks)
            yield from _lonely(part, [file for file in lonely if os.path.abspath(file) not in paired], what)
        return
    if part.split is not None or part.ann_dir is None or not lists_files_as_mmseg(part):
        return
    if not os.path.isdir(part.ann_dir):
        return
    used = {label_file(other, index) for other in parts for index in range(len(other.img_infos))}
    meant = {os.path.splitext(path)[0] for path, _ in files_alike(part.img_dir, part.img_suffix)}
    lonely = []
    for folder, _, names in os.walk(part.ann_dir):
        for name in names:
            file = os.path.join(folder, name)
            stem = os.path.relpath(file, part.ann_dir).removesuffix(part.seg_map_suffix)
            image = os.path.join(part.img_dir, stem + part.img_suffix)
            if (
                name.endswith(part.seg_map_suffix)
                and file not in used
                and stem not in meant
                and (os.path.isdir(image) or not os.path.exists(image))
            ):
                lonely.append(file)
    yield from _lonely(part, lonely, what)


def _lonely(part: CustomDataset, files: Sequence[str], what: str) -> Iterator[Finding]:
    if files:
        yield Finding(
            "label-maps-without-images",
            f"{what}: {counted(len(files), 'label map')} of {part.ann_dir} {are(len(files))} of no image in "
            f"{part.img_dir}: {shortened(sorted(files), 2)}; were images lost, or renamed?",
        )


def other_label_ending(part: CustomDataset, what: str) -> tuple[Setting, ...]:
    """The ending that all missing label maps have in truth, as a setting; nothing where there is no such
    one."""
    if not lists_files_as_mmseg(part) or not _takes(part, "seg_map_suffix"):
        return ()
    stems = [
        info["ann"]["seg_map"].removesuffix(part.seg_map_suffix) for info in part.img_infos if "ann" in info
    ]
    there: dict[str, set[str]] = {}
    for folder, _, names in os.walk(part.ann_dir):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), part.ann_dir)
            there.setdefault(os.path.splitext(path)[0], set()).add(os.path.splitext(path)[1])
    common = set.intersection(*(there.get(stem, set()) for stem in stems)) if stems else set()
    if len(common) != 1:
        return ()
    return (Setting(what, "seg_map_suffix", common.pop(), img_dir=part.img_dir),)


def _suffix_settings(part: CustomDataset, what: str, endings: list[str]) -> tuple[Setting, ...]:
    return (Setting(what, "img_suffix", endings, img_dir=part.img_dir),) if _takes(part, "img_suffix") else ()


def _takes(part: CustomDataset, argument: str) -> bool:
    """Whether this kind of data set may be given an argument, and does not set it by itself."""
    return argument in inspect.signature(type(part).__init__).parameters
