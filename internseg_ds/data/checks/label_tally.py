"""The label maps of a data set added up: what a check of all of them, or of some, judges by."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from internseg_ds.data.checks.looks import LabelLook
from internseg_ds.data.label_maps import LoadLabelMap

ASTRAY = 0.9
"""Pixels. Half a one is between the two ways of saying where a pixel lies: its corner, and its centre."""


class ClassOfNumber(dict[int, int]):
    """The class of each number of the label maps of one data set, looked up once.

    loader: which reads them. label_map: of a data set with `classes` of its own.
    """

    def __init__(self, loader: LoadLabelMap, label_map: Mapping[int, int] | None) -> None:
        super().__init__()
        self.loader, self.label_map = loader, None if label_map is None else dict(label_map)

    def __missing__(self, number: int) -> int:
        label = int(self.loader.to_classes(np.array([number], np.int64), self.label_map)[0])
        self[number] = label
        return label


@dataclass
class LabelTally:
    """What the label maps hold that were read."""

    maps: int = 0
    pixels: Counter[int] = field(default_factory=Counter)
    """By class; `ignore_index` and what is no class too."""
    images_with: Counter[int] = field(default_factory=Counter)
    """How many label maps have a class, and in `pixels_around` how many classed pixels these have in all."""
    pixels_around: Counter[int] = field(default_factory=Counter)
    numbers: Counter[int] = field(default_factory=Counter)
    """Pixels by number, as they stand in the files."""
    unknown_labels: list[str] = field(default_factory=list)
    """Files with a number that is no class."""
    unknown_numbers: Counter[int] = field(default_factory=Counter)
    misfits: list[str] = field(default_factory=list)
    """Files of other sides than their images."""
    turned: list[tuple[str, str, int]] = field(default_factory=list)
    """(label map, image, EXIF orientation) of misfits that the latter explains."""
    elsewhere: dict[str, LabelLook] = field(default_factory=dict)
    """By file, rasters that lie elsewhere on the Earth than their images."""
    nodata: dict[int, list[str]] = field(default_factory=dict)
    """Files by the number that they call no data, where it occurs in them, and stands for a class."""
    faults: list[str] = field(default_factory=list)
    """Why files are no label maps."""
    damaged: list[str] = field(default_factory=list)
    coloured: list[LabelLook] = field(default_factory=list)
    """Those that are pictures in colours, as far as colours were looked for."""
    storage: Counter[str] = field(default_factory=Counter)
    partial: int = 0
    """How many of the maps were not read whole."""
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def add(self, look: LabelLook, classes: ClassOfNumber) -> None:
        """classes: of the numbers in it."""
        if look.storage:
            self.storage[look.storage] += 1
        if look.damaged:
            self.damaged.append(f"{look.file} ({look.fault})")
            return
        if look.fault:
            self.faults.append(look.fault)
            if look.colours:
                self.coloured.append(look)
            return
        if look.turned > 1:
            self.turned.append((look.file, look.image, look.turned))
        elif look.misfit:
            self.misfits.append(look.misfit)
        if look.apart > ASTRAY:
            self.elsewhere[look.file] = look
        self._count(look, classes)

    def _count(self, look: LabelLook, classes: ClassOfNumber) -> None:
        loader = classes.loader
        self.maps += 1
        self.partial += look.partial
        self.sizes[look.shape] += 1
        pixels: dict[int, int] = {}
        strange = []
        for number, count in zip(look.numbers, look.pixels, strict=True):
            label = classes[number]
            self.numbers[number] += count
            pixels[label] = pixels.get(label, 0) + count
            if label == loader.stranger:
                self.unknown_numbers[number] += count
                strange.append(number)
        around = sum(pixels.values()) - pixels.get(loader.ignore_index, 0)
        for label, count in pixels.items():
            self.pixels[label] += count
            if 0 <= label < loader.classes and label != loader.ignore_index:
                self.images_with[label] += 1
                self.pixels_around[label] += around
        if look.nodata in look.numbers and loader.codes is None:  # a label_map says what is meant
            label = classes[look.nodata]
            files = self.nodata.setdefault(look.nodata, []) if label in range(loader.classes) else []
            if (
                label != loader.ignore_index and look.file not in files
            ):  # of which there may be several windows
                files.append(look.file)
        if strange:
            self.unknown_labels.append(f"{strange[0]} in {look.file}")
