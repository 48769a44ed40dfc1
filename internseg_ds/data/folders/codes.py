"""Label maps whose numbers, or colours, are not those of the classes.

In: what a mask file holds. Out: (h, w), the class of each pixel, or the data set's `ignore_index`.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from internseg_ds.errors import ConfigError, DataError, counted, shortened

Colour = tuple[int, int, int]
"""(R, G, B), 0 to 255."""
COLOURS = 2**24


@dataclass(frozen=True)
class NumberCodes:
    """classes: number in the files -> class, or `ignore_index`, which stands for none in files too."""

    classes: dict[int, int]
    ignore_index: int

    def classes_in(self, raw: np.ndarray, file: str) -> np.ndarray:
        """raw: whole numbers (h, w). Raises DataError for a number that stands for nothing."""
        numbers, places = np.unique(raw, return_inverse=True)
        strange = [number for number in numbers.tolist() if number not in self.classes]
        if strange:
            raise DataError(
                f"label map {file} has the number {shortened(list(map(str, strange)), 3)}, of which label_map "
                f"says nothing; it has {shortened(list(map(str, sorted(self.classes))), 8)}"
            )
        labels = np.array([self.classes[number] for number in numbers.tolist()])
        return labels.astype(np.min_scalar_type(max(0, *labels.tolist())))[places.reshape(raw.shape)]


@dataclass(frozen=True)
class ColourCodes:
    """classes: colour in the files -> class, or `ignore_index` for none."""

    classes: dict[Colour, int]
    ignore_index: int

    def classes_in(self, data: bytes, file: str) -> np.ndarray:
        """data: a picture file, with a palette too. Raises DataError for a colour that stands for nothing."""
        with Image.open(io.BytesIO(data)) as image:
            return self.classes_of(np.asarray(image.convert("RGB")), file)

    def classes_of(self, rgb: np.ndarray, file: str) -> np.ndarray:
        """As `classes_in`, of colours (h, w, 3) uint8."""
        codes = rgb.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
        labels = self._table[codes]
        strange = labels == self._stranger
        if strange.any():
            colours, counts = np.unique(codes[strange], return_counts=True)
            colour = _split(int(colours[counts.argmax()]))
            near = min(self.classes, key=lambda other: sum((a - b) ** 2 for a, b in zip(colour, other)))
            raise DataError(
                f"label map {file} has the colour {colour}, which is of no class; the nearest is {near} "
                f"({counted(int(strange.sum()), 'such pixel')} of {counted(colours.size, 'colour')}). Add it to "
                "colours (None: no class), or save the label maps without smoothing, as PNG"
            )
        return labels

    @property
    def _stranger(self) -> int:
        return max(*self.classes.values(), self.ignore_index) + 1

    @cached_property
    def _table(self) -> np.ndarray:
        """The class of each of all colours."""
        table = np.full(COLOURS, self._stranger, np.min_scalar_type(self._stranger))
        for (red, green, blue), label in self.classes.items():
            table[red * 65536 + green * 256 + blue] = label
        return table


def number_codes(label_map: Any, classes: Sequence[str], ignore_index: int) -> NumberCodes:
    """label_map: number -> class, by name or place, or None for no class; "0/255": 0 is the first of two
    classes, and 255 the second. Raises ConfigError."""
    if label_map == "0/255":
        if len(classes) != 2:
            raise ConfigError(
                f"label_map='0/255' needs one or two classes (of one, 'background' is the other); there are "
                f"{len(classes)}: {shortened(list(classes))}"
            )
        return NumberCodes({0: 0, 255: 1}, ignore_index)
    if not isinstance(label_map, Mapping) or not label_map:
        raise ConfigError(f"label_map={label_map!r} must be '0/255', or {{number: class, or None for none}}")
    known: dict[int, int] = {ignore_index: ignore_index}
    for number, label in label_map.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(f"label_map: {number!r} is no whole number")
        known[number] = _index(label, classes, ignore_index, "label_map")
    return NumberCodes(known, ignore_index)


def colour_codes(colours: Any, classes: Sequence[str], ignore_index: int) -> ColourCodes:
    """colours: {colour: class, by name or place, or None}, or a colour for each class; a colour is (R, G, B) or
    "#rrggbb". Raises ConfigError."""
    if isinstance(colours, Mapping):
        items: Iterable[tuple[Any, Any]] = colours.items()
    elif isinstance(colours, (list, tuple)) and len(colours) == len(classes):
        items = zip(colours, range(len(classes)))
    else:
        raise ConfigError(
            f"colours must be {{(R, G, B): class}}, or as many colours as there are classes ({len(classes)})"
        )
    found: dict[Colour, int] = {}
    for given, label in items:
        colour, index = _colour(given), _index(label, classes, ignore_index, "colours")
        if found.setdefault(colour, index) != index:
            raise ConfigError(f"colours has {colour} twice, for two classes")
    return ColourCodes(found, ignore_index)


def palette_of(codes: ColourCodes, classes: Sequence[str]) -> list[list[int]]:
    """The (first) colour of each class. Raises ConfigError for a class that has none."""
    first: dict[int, Colour] = {}
    for colour, label in codes.classes.items():
        first.setdefault(label, colour)
    if missing := [name for index, name in enumerate(classes) if index not in first]:
        raise ConfigError(f"colours has none for {shortened(missing)}, which would never occur")
    return [list(first[index]) for index in range(len(classes))]


def _index(label: Any, classes: Sequence[str], ignore_index: int, key: str) -> int:
    if label is None:
        return ignore_index
    if isinstance(label, str) and label in classes:
        return list(classes).index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return label
    raise ConfigError(f"{key}: {label!r} is none of the classes {shortened(list(classes), 10)}")


def _colour(given: Any) -> Colour:
    if isinstance(given, str) and len(given) == 7 and given.startswith("#"):
        try:
            return _split(int(given[1:], 16))
        except ValueError:
            pass
    elif (
        isinstance(given, (list, tuple))
        and len(given) == 3
        and all(isinstance(value, int) and 0 <= value < 256 for value in given)
    ):
        return given[0], given[1], given[2]
    raise ConfigError(f"colours: {given!r} is no colour; write (R, G, B) of 0 to 255, or '#rrggbb'")


def _split(code: int) -> Colour:
    return code >> 16, code >> 8 & 255, code & 255
