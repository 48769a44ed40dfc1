"""Images that stand in two data sets, the training's and the validation's, say: a score on images that were
trained on says little.

In: what images are recognised by (`ImageLook`). Out: pairs of files. The same bytes are found for sure. What
looks alike is found by 8 x 8 grey values: copies in another size or quality, and neighbouring frames of a
video. A crop, a mirrored or a turned copy is not found, and two pictures of one place from one camera may be
taken for copies.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from internseg_ds.data.checks.findings import Finding
from internseg_ds.data.checks.image_looks import ImageLook
from internseg_ds.data.checks.looks import image_file
from internseg_ds.data.checks.survey import looked_at
from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.errors import counted, shortened

MOST_BITS = 3
"""Of the 64 of the average hash: by how many two images may differ that look alike."""
MOST_LEVELS = 3.0
"""Of 255: by how much their grey values may differ on average."""
FLAT = 6.0
"""Standard deviation of grey values below which a picture has nothing to be recognised by."""
AT_A_TIME = 2048


@dataclass(frozen=True)
class Duplicates:
    """Pairs of files, (one of the first data set, one of the second)."""

    same: list[tuple[str, str]]
    """The same bytes."""
    alike: list[tuple[str, str]]
    """Not the same bytes, and nearly the same picture."""


def shared_images(trained: SegmentationDataset, scored: SegmentationDataset) -> list[str]:
    """A warning where files of one set are files of the other, by their paths alone: no file is opened."""
    first, second = map(_files, (trained, scored))
    if not (both := sorted(first & second)):
        return []
    return [
        f"{counted(len(both), 'image')} of the {len(second)} of data.val {'is' if len(both) == 1 else 'are'} trained "
        f"on, {both[0]} for one; the score is partly one of images that were trained on"
    ]


def _files(dataset: SegmentationDataset) -> set[str]:
    return {
        os.path.abspath(image_file(part, index))
        for part in looked_at(dataset)
        for index in range(len(part.img_infos))
    }


def find_duplicates(first: Sequence[ImageLook], second: Sequence[ImageLook]) -> Duplicates:
    """Each image of the second set with one of the first that it is a copy of, where there is any."""
    by_digest = {look.digest: look.file for look in first if look.digest}
    same = [(by_digest[look.digest], look.file) for look in second if look.digest in by_digest]
    known = {file for _, file in same}
    others = [look for look in second if look.file not in known]
    return Duplicates(same, list(_alike(_recognisable(first), _recognisable(others))))


def duplicate_findings(found: Duplicates, total: int) -> Iterator[Finding]:
    """total: images of the second data set that were looked at."""
    if found.same:
        yield Finding(
            "duplicates",
            f"{counted(len(found.same), 'image')} of the {total} of data.val looked at "
            f"{'stands' if len(found.same) == 1 else 'stand'} in data.train too, byte for byte: "
            f"{_words(found.same)}; the score is partly one of images that were trained on",
        )
    if found.alike:
        yield Finding(
            "look-alikes",
            f"{counted(len(found.alike), 'image')} of the {total} of data.val looked at "
            f"{'looks' if len(found.alike) == 1 else 'look'} at 8 x 8 grey values like one of data.train: "
            f"{_words(found.alike)}; copies in another size or quality, frames of one video, or merely one "
            "scene: look at them",
        )


def average_hash(thumbnails: np.ndarray) -> np.ndarray:
    """Whether each grey value is above the mean of its picture (n, 64), as 1 and -1 in float32. thumbnails:
    (n, 64). Source: N. Krawetz, "Looks Like It", 2011."""
    return np.where(thumbnails > thumbnails.mean(axis=1, keepdims=True), 1, -1).astype(np.float32)


def _recognisable(looks: Sequence[ImageLook]) -> list[ImageLook]:
    kept = [look for look in looks if look.thumbnail]
    values = _values(kept)
    return [look for look, deviation in zip(kept, values.std(axis=1), strict=True) if deviation >= FLAT]


def _values(looks: Sequence[ImageLook]) -> np.ndarray:
    """Grey values (n, 64) float32."""
    if not looks:
        return np.zeros((0, 64), np.float32)
    return np.stack([np.frombuffer(look.thumbnail, np.uint8) for look in looks]).astype(np.float32)


def _alike(first: Sequence[ImageLook], second: Sequence[ImageLook]) -> Iterator[tuple[str, str]]:
    if not first or not second:
        return
    values, hashes = _values(first), average_hash(_values(first))
    for start in range(0, len(second), AT_A_TIME):
        some = second[start : start + AT_A_TIME]
        theirs = _values(some)
        differing = (64 - average_hash(theirs) @ hashes.T) / 2  # bits
        for place, look in enumerate(some):
            candidates = np.flatnonzero(differing[place] <= MOST_BITS)
            if not candidates.size:
                continue
            distances = np.abs(values[candidates] - theirs[place]).mean(axis=1)
            if distances.min() <= MOST_LEVELS:
                yield first[candidates[distances.argmin()]].file, look.file


def _words(pairs: Sequence[tuple[str, str]]) -> str:
    return shortened([f"{second} and {first}" for first, second in pairs], 2)
