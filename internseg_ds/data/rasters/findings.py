"""What the rasters of a data set say about it: channels and types that differ, scenes that are read whole.

In: heads of files. Out: findings.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from internseg_ds.data.checks.findings import Finding
from internseg_ds.data.rasters.image_check import normalized_channels
from internseg_ds.data.rasters.loading import LoadRasterWindow, raster_loader
from internseg_ds.data.rasters.looks import RasterHead
from internseg_ds.errors import counted

LARGE = 10_000 * 10_000
"""Pixels of a scene above which reading it whole is odd: logits of 10 classes take 4 GB then."""


def raster_findings(heads: Sequence[tuple[str, RasterHead]], part: Any, what: str) -> Iterator[Finding]:
    """heads: (file, head) of those looked at. part: their data set, which reads rasters; what: its name."""
    steps = part.pipeline.transforms
    expected = normalized_channels(steps)
    others = [(file, head) for file, head in heads if expected not in (None, head.channels)]
    if others:
        file, head = others[0]
        yield Finding(
            "raster-channels",
            f"{what}: {counted(len(others), 'raster has', 'rasters have')} other channels than Normalize, which has "
            f"mean and std of {expected}: {file} has {counted(head.channels, 'channel')} of {head.dtype} "
            f"({len(heads)} looked at); write one number for each channel, or choose channels=[...] of LoadRaster",
            wrong=len(others) == len(heads),
        )
    first_of = {head.dtype: file for file, head in reversed(heads)}
    if len(first_of) > 1:
        words = ", ".join(f"{file} of {dtype}" for dtype, file in sorted(first_of.items()))
        yield Finding(
            "raster-types",
            f"{what}: rasters hold numbers of different types, and one mean and std for all: {words}; are they of one "
            "scale?",
        )
    loader = raster_loader(steps)
    large = [(file, head) for file, head in heads if head.size[0] * head.size[1] > LARGE]
    if large and not isinstance(loader, LoadRasterWindow) and loader is not None and loader.tile is None:
        file, head = large[0]
        yield Finding(
            "read-whole",
            f"{what}: {file} has {head.size[0]} x {head.size[1]} pixels and is read whole; "
            "LoadRaster(tile=(2048, 2048)) makes an image of each window, LoadRasterWindow draws windows for training",
        )
