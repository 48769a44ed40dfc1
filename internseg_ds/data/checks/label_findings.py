"""What the label maps of a data set say about it, held against its classes.

In: a `LabelTally` of all of them, or of some. Out: findings. What a sample cannot show for sure is odd, not
wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from mmseg.datasets import CustomDataset

from internseg_ds.data.checks.findings import Finding, Setting
from internseg_ds.data.checks.label_tally import LabelTally
from internseg_ds.data.checks.looks import is_lossy
from internseg_ds.data.folders.dataset import FolderDataset
from internseg_ds.data.label_maps import LoadLabelMap
from internseg_ds.data.orientation import FIX, TURNS
from internseg_ds.errors import counted, shortened

MOSTLY_IGNORED = 0.9
"""Share of pixels of no class above which a warning says so: labels drawn as scribbles have as many, and are
right."""

MOST_PIXELS = 1e9
OF_JPEGS = (
    ". The label maps are JPEGs, which change numbers, so the right ones cannot be told any more: write the label maps "
    "anew, as .png, from what they were made of"
)
NAMES_OF_ZERO = (
    "background",
    "other",
    "others",
    "none",
    "void",
    "unlabeled",
    "unlabelled",
    "unknown",
    "ignore",
)
"""Of a class that is usually number 0."""


@dataclass(frozen=True)
class Examined:
    """Which label maps were looked at, and what for."""

    what: str
    """The data set's name in messages ("data.train")."""
    part: CustomDataset
    """The (first) data set that they belong to."""
    loader: LoadLabelMap
    total: int
    """Label maps that there are."""
    training: bool
    refused_above: int | None
    """How many label maps may not fit their images before that is wrong; None: that is a warning."""

    def words(self, tally: LabelTally) -> str:
        if self.all_of(tally):
            return f"all {self.total}"
        return f"{'some windows of ' * bool(tally.partial)}the {tally.maps} (of {self.total:,})"

    def all_of(self, tally: LabelTally) -> bool:
        return tally.maps == self.total and not tally.partial

    def refuses(self, number: int) -> bool:
        return self.refused_above is not None and number > self.refused_above


def label_findings(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    """All that a tally of label maps shows."""
    yield from _no_label_maps(tally, about)
    if not tally.maps:
        return
    nothing_to_learn = list(_one_class(tally, about))
    yield from nothing_to_learn
    if not nothing_to_learn:
        yield from _missing_classes(tally, about)
    yield from _turned(tally, about)
    yield from _misfits(tally, about)
    yield from _elsewhere(tally, about)
    yield from _unknown_labels(tally, about)
    yield from _without_data(tally, about)
    yield from _mostly_ignored(tally, about)


def present_classes(tally: LabelTally, part: CustomDataset) -> list[int]:
    """The classes that occur, ascending."""
    return [index for index in sorted(tally.pixels) if 0 <= index < len(part.CLASSES)]


def _no_label_maps(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    """Files that are no label maps: pictures in colours, numbers that are not whole."""
    if tally.faults:
        looked_at = tally.maps + len(tally.faults) + len(tally.damaged)
        yield Finding(
            "colour-coded" if any(_is_colour(fault) for fault in tally.faults) else "no-label-map",
            f"{about.what}: {counted(len(tally.faults), 'file')} of the {looked_at} looked at "
            f"{'is no label map' if len(tally.faults) == 1 else 'are no label maps'}: "
            f"{tally.faults[0]}{OF_JPEGS if is_lossy(about.part) else _about_colours(tally, about.part)}",
            wrong=about.refuses(len(tally.faults)),
        )


def _is_colour(fault: str) -> bool:
    return "numbers for each pixel" in fault


def _about_colours(tally: LabelTally, part: CustomDataset) -> str:
    """What the colours of pictures that should be label maps have to do with the classes."""
    colours = {colour for look in tally.coloured for colour in look.colours}
    if not colours:
        return ""
    if all(len(set(colour)) == 1 for colour in colours):
        if len(colours) == 1 or "Its last channel" in tally.faults[0]:  # which says what tells pixels apart
            return ""
        return f". Their three numbers are the same in each pixel ({shortened(_grey(colours), 4)}): keep one of them"
    palette = {tuple(map(int, colour)): name for colour, name in zip(part.PALETTE or (), part.CLASSES)}
    known = sorted(colour for colour in colours if colour in palette)
    others = sorted(colours - set(known))
    if known:
        pairs = shortened([f"{colour} is {palette[colour]}" for colour in known], 4)
        rest = f"; not in it: {shortened(list(map(str, others)), 3)}" if others else ""
        return f". Colours of the data set's palette: {pairs}{rest}"
    return f". None of their colours ({shortened(list(map(str, others)), 4)}) is in the data set's palette"


def _grey(colours: set[tuple[int, ...]]) -> list[str]:
    return [str(colour[0]) for colour in sorted(colours)]


def _one_class(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    """All label maps together hold but one class of several, or none; or one class is 0, and 255 all else."""
    classes, present = about.part.CLASSES, present_classes(tally, about.part)
    hint = _hint_of_255(tally, about.part)
    binary = bool(hint) and tally.numbers.keys() == {0, 255}
    if about.training and about.all_of(tally) and len(present) < 2 and (len(classes) > 1 or binary):
        yield Finding(
            "masks-0-255" if hint else "one-class",
            f"{about.what}: there is nothing to learn: of {counted(len(classes), 'class')} {about.words(tally)} label "
            f"maps hold {f'{classes[present[0]]} alone' if present else 'none'}"
            f"{hint or '; are reduce_zero_label, classes and ignore_index right?'}",
            wrong=True,
            settings=(Setting(about.what, "label_map", "0/255"),)
            if binary and _has_label_map(about.part)
            else (),
        )


def _missing_classes(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    part = about.part
    missing = [
        str(name)
        for index, name in enumerate(part.CLASSES)
        if index not in tally.pixels and index != part.ignore_index
    ]
    if missing:
        hint = _hint_of_255(tally, part)
        yield Finding(
            "masks-0-255" if hint else "absent-classes",
            f"{about.what}: {len(missing)} of {len(part.CLASSES)} classes "
            f"{'occurs' if len(missing) == 1 else 'occur'} in none of {about.words(tally)} label maps looked "
            f"at: {shortened(missing, 8)}{hint}{_hint_of_zero(tally, about)}",
        )


def _hint_of_255(tally: LabelTally, part: CustomDataset) -> str:
    """The end of a message where files may use 255 for a class that counts as none."""
    if part.ignore_index != 255 or not tally.numbers.keys() <= {0, 255}:
        return ""
    if len(part.CLASSES) <= 2 and _has_label_map(part):
        mended = f'label_map="0/255" of {type(part).__name__} reads them so'
    else:
        mended = f"write {max(1, len(part.CLASSES) - 1)} in its place"
        mended += ", and two names in classes" if len(part.CLASSES) == 1 else ""
    return (
        f". They hold no number but {' and '.join(map(str, sorted(tally.numbers)))}, and 255 stands for no "
        f"class; if 255 is meant to be {part.CLASSES[-1]}, {mended}"
    )


def _has_label_map(part: CustomDataset) -> bool:
    """Whether it takes label_map="0/255", and has none."""
    return isinstance(part, FolderDataset) and part.label_codes is None


def _hint_of_zero(tally: LabelTally, about: Examined) -> str:
    """The end of a message where zero may be reduced although it is a class."""
    numbers, loader = tally.numbers, about.loader
    last = len(about.part.CLASSES)
    if not loader.reduce_zero_label or 0 not in numbers or last in numbers or last - 1 not in numbers:
        return ""
    return (
        f". reduce_zero_label is set, and the numbers in the files are 0 to {last - 1}: if 0 is "
        f"{about.part.CLASSES[0]}, take it out of LoadAnnotations and of the data sets"
    )


def _turned(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    """Images that EXIF turns against their label maps."""
    if tally.turned:
        file, image, turn = tally.turned[0]
        yield Finding(
            "exif-turned",
            f"{about.what}: of {about.words(tally)} label maps looked at, {len(tally.turned)} "
            f"{'lies' if len(tally.turned) == 1 else 'lie'} across the image: EXIF of {image} {TURNS[turn]}, "
            f"and label map {file} is not turned; {FIX}",
            wrong=about.refuses(len(tally.turned)),
            settings=(
                Setting(about.what, "color_type", "color_ignore_orientation", step="LoadImageFromFile"),
            ),
        )


def _misfits(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    if tally.misfits:
        wrong = about.refuses(len(tally.misfits))
        yield Finding(
            "other-sides",
            f"{about.what}: of {about.words(tally)} label maps looked at, "
            f"{counted(len(tally.misfits), 'has', 'have')} other sides than their images: "
            f"{shortened(tally.misfits, 2)}; "
            f"{'there must be one class per pixel' if wrong else 'those images are left out'}",
            wrong=wrong,
        )


def _elsewhere(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    """Label maps of the sides of their images, and of another place."""
    if tally.elsewhere:
        look = max(tally.elsewhere.values(), key=lambda other: other.apart)
        yield Finding(
            "georeference",
            f"{about.what}: {counted(len(tally.elsewhere), 'label map lies', 'label maps lie')} elsewhere on the Earth "
            f"than {'its image' if len(tally.elsewhere) == 1 else 'their images'}, by up to "
            f"{f'{look.apart:,.0f} pixels' if look.apart < MOST_PIXELS else 'more than can be said'} ({look.file} and "
            f"{look.image}); they are read pixel by pixel, as if they lay at the same place",
        )


def _unknown_labels(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    if not tally.unknown_labels:
        return
    zero = _may_be_zero(tally, about)
    settings, why = _zero_meanings(tally, about) if zero else ((), "")
    if is_lossy(about.part):
        why = OF_JPEGS
    yield Finding(
        "zero-label" if zero else "unknown-labels",
        f"{about.what}: of {about.words(tally)} label maps looked at, "
        f"{counted(len(tally.unknown_labels), 'holds', 'hold')} a number that is no class, "
        f"and not {about.part.ignore_index} for none either; its pixels "
        f"{'would end the run' if about.training else 'count as wrong'}: "
        f"{shortened(tally.unknown_labels, 2)}{why}",
        wrong=about.training and about.refuses(len(tally.unknown_labels)),
        settings=settings,
    )


def _may_be_zero(tally: LabelTally, about: Examined) -> bool:
    """Whether numbers of 0 to classes, read as 1 to classes, are all classes."""
    if about.loader.reduce_zero_label or about.loader.codes is not None or is_lossy(about.part):
        return False  # in a JPEG, it may be any other number's noise
    return tally.unknown_numbers.keys() == {about.loader.in_file(about.part.label_map)}


def _zero_meanings(tally: LabelTally, about: Examined) -> tuple[tuple[Setting, ...], str]:
    """What mends numbers of 0 to classes, and the end of a message that says why. Nothing mends them where two
    readings fit: 0 stands for none, or one class more has no name."""
    part, last = about.part, about.loader.in_file(about.part.label_map)
    settings = zero_label_settings(True)
    if 0 not in tally.numbers:
        return settings, f". The numbers are 1 to {last}: classes seem to be counted from 1"
    numbers = f". The numbers are 0 to {last}, one more than there are classes"
    if 0 in tally.nodata:
        return settings, f"{numbers}, and 0 is the nodata value of {tally.nodata[0][0]}, so 0 stands for none"
    if _names_are_known(part):
        return settings, f"{numbers} of {type(part).__name__}, so 0 seems to stand for none"
    hint = ""
    if part.ignore_index in tally.numbers:
        hint = f" (the latter is likely, for {part.ignore_index} stands for none in them)"
    elif str(part.CLASSES[0]).lower() in NAMES_OF_ZERO:
        hint = f" (the latter is likely, for the first class is called {part.CLASSES[0]})"
    return (), (
        f"{numbers}. Either 0 stands for none: write {' and '.join(map(str, settings))}. Or one class more has no "
        f"name: write {last + 1} of them in classes, and num_classes={last + 1} in the heads{hint}"
    )


def _names_are_known(part: CustomDataset) -> bool:
    """Whether the classes are those of a published data set, and not the config's own."""
    return type(part).CLASSES is not None and type(part).__module__.partition(".")[0] in (
        "mmseg",
        "internseg_ds",
    )


def _without_data(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    """Numbers that the files call their nodata value, and that are classes."""
    for number, files in sorted(tally.nodata.items()):
        name = about.part.CLASSES[about.loader.to_classes(np.array([number]), about.part.label_map)[0]]
        none = about.part.ignore_index
        yield Finding(
            "nodata-is-a-class",
            f"{about.what}: {number} is the nodata value of {counted(len(files), 'label map')} of those looked at, "
            f"and is {'trained on' if about.training else 'scored'} as {name} there: {shortened(files, 2)}. If these "
            f"pixels are of no class, write {none} in their place, or label_map={{{number}: None, ...}} of "
            f"FolderDataset; if they are {name}, take the nodata value out of the files (gdal_edit.py -unsetnodata)",
        )


def zero_label_settings(reduced: bool) -> tuple[Setting, ...]:
    """The two places of reduce_zero_label: for training, and for scores."""
    return (
        Setting("data.train", "reduce_zero_label", reduced, step="LoadAnnotations"),
        Setting("data.val", "reduce_zero_label", reduced),
    )


def _mostly_ignored(tally: LabelTally, about: Examined) -> Iterator[Finding]:
    total = sum(tally.pixels.values())
    share = tally.pixels[about.part.ignore_index] / max(1, total)
    if share > MOSTLY_IGNORED:
        yield Finding(
            "mostly-ignored",
            f"{about.what}: {share:.1%} of the pixels of {about.words(tally)} label maps looked at are of no "
            f"class ({about.part.ignore_index} in the network's labels), so little is "
            f"{'learnt' if about.training else 'scored'} of each image; are the numbers of no class meant to "
            f"be none? They hold {shortened([str(number) for number, _ in tally.numbers.most_common()], 6)}",
        )
