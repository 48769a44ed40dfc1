"""The label maps of a data set added up: what a check of all of them, or of some, judges by."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from internseg_ds.data.checks.looks import LabelLook
from internseg_ds.data.label_maps import LoadLabelMap


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
    faults: list[str] = field(default_factory=list)
    """Why files are no label maps."""
    damaged: list[str] = field(default_factory=list)
    coloured: list[LabelLook] = field(default_factory=list)
    """Those that are pictures in colours, as far as colours were looked for."""
    storage: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def add(self, look: LabelLook, loader: LoadLabelMap, label_map: Mapping[int, int] | None) -> None:
        """loader: which read it. label_map: of a data set with `classes` of its own."""
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
        self._count(look, loader, label_map)

    def _count(self, look: LabelLook, loader: LoadLabelMap, label_map: Mapping[int, int] | None) -> None:
        numbers = np.array(look.numbers, np.int64)
        labels = loader.to_classes(numbers, None if label_map is None else dict(label_map)).tolist()
        self.maps += 1
        self.sizes[look.shape] += 1
        classed = {label for label in labels if 0 <= label < loader.classes and label != loader.ignore_index}
        around = sum(
            count for label, count in zip(labels, look.pixels, strict=True) if label != loader.ignore_index
        )
        for label in classed:
            self.images_with[label] += 1
            self.pixels_around[label] += around
        strange = []
        for number, label, count in zip(look.numbers, labels, look.pixels, strict=True):
            self.numbers[number] += count
            self.pixels[label] += count
            if label == loader.stranger:
                self.unknown_numbers[number] += count
                strange.append(number)
        if strange:
            self.unknown_labels.append(f"{strange[0]} in {look.file}")
