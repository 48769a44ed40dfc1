"""What the image files of a data set say about it: EXIF turns that nobody can see, and images of which the
loader takes a part.

In: an `ImageTally` of all of them, or of some. Out: findings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from mmseg.datasets import CustomDataset

from internseg_ds.data.checks.findings import Finding
from internseg_ds.data.checks.looks import Head, heeds_exif, image_loader
from internseg_ds.data.orientation import FIX, TURNS
from internseg_ds.errors import are, counted, shortened


@dataclass
class ImageTally:
    """What the images are that were looked at."""

    looked: int = 0
    turned: list[tuple[str, int]] = field(default_factory=list)
    """(file, EXIF orientation) of those that are read turned, in a way that their sides do not show."""
    reduced: list[tuple[str, str]] = field(default_factory=list)
    """(file, what it has) of those that have more than the loader takes."""
    damaged: list[str] = field(default_factory=list)
    cut_short: list[str] = field(default_factory=list)
    """JPEGs without an end, whose last rows OpenCV fills with grey."""

    def add_head(self, file: str, head: Head | None) -> None:
        self.looked += 1
        square = head is not None and head.stored[0] == head.stored[1]
        if head is not None and (head.turn in (2, 3, 4) or (head.turn >= 5 and square)):
            self.turned.append((file, head.turn))

    def add_decoded(self, file: str, image: np.ndarray) -> None:
        """image: all of it, as OpenCV reads it unchanged."""
        channels = 1 if image.ndim < 3 else image.shape[2]
        if image.dtype != np.uint8 or channels > 3:
            self.reduced.append((file, f"{counted(channels, 'channel')} of {image.dtype}"))


def image_findings(tally: ImageTally, part: CustomDataset, what: str) -> Iterator[Finding]:
    """All that the images of a data set show. what: its name in messages."""
    loader = image_loader(part)
    if loader is not None and loader.color_type == "color":
        if tally.turned and part.ann_dir is not None and heeds_exif(loader):
            file, turn = tally.turned[0]
            yield Finding(
                "exif-unseen",
                f"{what}: EXIF {TURNS[turn]} in {file} ({len(tally.turned)} such images of "
                f"{tally.looked} looked at), so it is read turned; that its label map was drawn on the turned "
                f"picture cannot be seen: {FIX}",
            )
        if tally.reduced:
            file, stored = tally.reduced[0]
            yield Finding(
                "more-than-8-bit-rgb",
                f"{what}: {file} has {stored}, and is read as 3 of uint8; "
                "LoadImageFromFile(color_type='unchanged'), or LoadRaster, reads all of it, for a backbone with as "
                "many in_channels",
            )
    if tally.damaged:
        yield Finding(
            "damaged",
            f"{what}: {counted(len(tally.damaged), 'image')} of {tally.looked} looked at "
            f"{are(len(tally.damaged))} damaged: {shortened(tally.damaged, 2)}; copy them again, or take them "
            "away",
            wrong=True,
        )
    if tally.cut_short:
        yield Finding(
            "cut-short",
            f"{what}: {counted(len(tally.cut_short), 'JPEG has', 'JPEGs have')} no end, so what is missing is "
            f"read as grey: {shortened(tally.cut_short, 2)}; copy them again",
        )


def decoded(data: np.ndarray) -> np.ndarray | None:
    """The picture in the bytes of a file, unchanged; None where OpenCV knows none."""
    try:
        return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:  # of an empty file
        return None
