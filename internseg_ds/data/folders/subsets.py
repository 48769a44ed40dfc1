"""Parts of a data set: the images that a file names, those to train on or to validate on, and few-shot subsets
that grow with their size.

In: pairs of image and label map. Out: some of them, in the same order.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from internseg_ds.data.folders.pairs import Pair, nearest
from internseg_ds.errors import DataError, counted


def named_in(file: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The images that a file names, one a line: the path below root with or without its ending, what the
    wildcards matched, or the mere name where only one image is called so. Raises DataError."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"split={file!r} cannot be read: {error}") from None
    known: dict[str, set[int]] = {}
    for place, pair in enumerate(pairs):
        stem = os.path.splitext(pair.image)[0]
        for name in {pair.image, stem, pair.stem, os.path.basename(pair.image), os.path.basename(stem)}:
            known.setdefault(name, set()).add(place)
    wanted: set[int] = set()
    for line in filter(None, map(str.strip, lines)):
        places = known.get(line, set())
        if not places:
            near = nearest(line, known)
            raise DataError(
                f"{line} of the split file {file} is no image that `images` matches"
                f"{f' (the nearest is {near})' if near else ''}; correct the line, or take it out"
            )
        if len(places) > 1:
            paths = sorted(os.path.join(pairs[place].root, pairs[place].image) for place in places)
            raise DataError(
                f"{line} of the split file {file} may be {paths[0]} or {paths[1]}; write more of it"
            )
        wanted |= places
    if not wanted:
        raise DataError(f"the split file {file} names no image")
    return [pairs[place] for place in sorted(wanted)]


def on_side(fold: str, validation_share: float, pairs: Sequence[Pair]) -> list[Pair]:
    """The images to train on (fold "train") or to validate on ("val"): each falls to a side by what the wildcards
    matched in its path alone, so that it stays there whatever images come or go, and wherever the folders lie.

    Raises DataError where no image falls to this side.
    """
    chosen = [pair for pair in pairs if (_position(pair.stem) < validation_share) == (fold == "val")]
    if not chosen:
        raise DataError(
            f"none of {counted(len(pairs), 'image')} falls to fold={fold!r} at validation_share={validation_share}; "
            "change the share, or name the images of each side in split files"
        )
    return chosen


def _position(stem: str) -> float:
    """A number in [0, 1) that looks random, always the same one for the same name."""
    digest = hashlib.blake2b(stem.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def drawn(total: int, number: int, seed: int) -> list[int]:
    """Places of so many of `total` images, ascending; those of a smaller number are among them."""
    return sorted(np.random.default_rng(seed).permutation(total)[:number].tolist())


def drawn_per_class(
    total: int, number: int, seed: int, classes_of: Callable[[int], Collection[int]]
) -> list[int]:
    """Places of images, ascending, such that each class is in `number` of them, or in all that have it: in a
    drawn order, each that has a class of which there are too few."""
    taken: list[int] = []
    counts: Counter[int] = Counter()
    for place in np.random.default_rng(seed).permutation(total).tolist():
        classes = classes_of(place)
        if any(counts[label] < number for label in classes):
            taken.append(place)
            counts.update(classes)
    return sorted(taken)
