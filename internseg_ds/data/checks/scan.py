"""All images and label maps of a data set looked at, or so many of them, in several processes.

In: mmseg's data sets as `datasets.assembled_datasets` gives them. Out: `Scanned`: tallies, and what each image
is recognised by. Nothing is judged here, and nothing is drawn at random but by a fixed seed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmseg.datasets import CustomDataset
from torch.utils.data import DataLoader, Dataset

from internseg_ds.data.checks.image_findings import ImageTally
from internseg_ds.data.checks.image_looks import ImageLook, look_at_image, look_at_raster
from internseg_ds.data.checks.label_tally import ClassOfNumber, LabelTally
from internseg_ds.data.checks.looks import (
    LabelLook,
    image_file,
    label_file,
    label_loader,
    look_at_labels,
    raster_loader_of,
)
from internseg_ds.data.checks.survey import drawn
from internseg_ds.data.loading import loaded, quiet_worker
from internseg_ds.data.rasters.looks import RasterHead
from internseg_ds.data.rasters.windows import WINDOW
from internseg_ds.progress import progress

CHUNK = 16
"""Images that a process looks at before it hands over what it saw."""
MEASURED = 128
"""Images of a data set whose colours are measured: mean and deviation of more would hardly differ."""
Item = tuple[int, int, bool]
"""Which part of a data set, which image of it, and whether its colours are measured."""


@dataclass
class Scanned:
    """What was seen of one data set. parts: its plain data sets."""

    parts: Sequence[CustomDataset]
    total: int
    """Images that it has; those that were looked at are in `looks`."""
    looks: list[ImageLook] = field(default_factory=list)
    images: list[ImageTally] = field(default_factory=list)
    """Of each part."""
    labels: LabelTally = field(default_factory=LabelTally)
    rasters: list[dict[str, RasterHead]] = field(default_factory=list)
    """Of each part, the heads of its rasters by file."""
    own_loaders: list[str] = field(default_factory=list)
    """Loaders of the user's own, whose label maps are not counted."""


class Looks(Dataset):
    """What there is to see in each image of `items` and in its label map."""

    def __init__(self, parts: Sequence[CustomDataset], items: Sequence[Item], *, training: bool) -> None:
        self.parts, self.items = parts, items
        self.loaders = [label_loader(part, training=training) for part in parts]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[int, ImageLook, LabelLook | None]:
        number, index, measured = self.items[place]
        part, loader = self.parts[number], self.loaders[number]
        file, rasters = image_file(part, index), raster_loader_of(part)
        if rasters is None:
            image = look_at_image(file, measured=measured)
        else:
            image = look_at_raster(file, rasters, part.img_infos[index].get(WINDOW), measured=measured)
        if loader is None or "ann" not in part.img_infos[index]:
            return number, image, None
        return number, image, look_at_labels(part, index, loader, image.head, details=True)


def scan(
    parts: Sequence[CustomDataset],
    what: str,
    *,
    training: bool,
    workers: int,
    sample: int | None = None,
) -> Scanned:
    """Looks at `sample` images of a data set, drawn by a fixed seed, or at all.

    what: its name ("data.train"), before the bar that shows how far this is. workers: processes; 0 looks in
    this one. Files that are not there are passed over.
    """
    items = _items(parts, sample)
    seen = Looks(parts, items, training=training)
    found = Scanned(
        parts, sum(map(len, parts)), images=[ImageTally() for _ in parts], rasters=[{} for _ in parts]
    )
    found.own_loaders = [
        type(part).__name__
        for part, loader in zip(parts, seen.loaders, strict=True)
        if loader is None and part.ann_dir is not None
    ]
    classes = [
        None if loader is None else ClassOfNumber(loader, part.label_map)
        for part, loader in zip(parts, seen.loaders, strict=True)
    ]
    loader = DataLoader(
        seen, batch_size=CHUNK, num_workers=workers, collate_fn=list, worker_init_fn=quiet_worker
    )
    with progress(f"looking at {what}", len(items), "images") as done:
        for chunk in loaded(loader):
            for number, image, labels in chunk:
                _add(found, number, image, labels, classes[number])
            done.advance(len(chunk))
    return found


def _items(parts: Sequence[CustomDataset], sample: int | None) -> list[Item]:
    """The images that are looked at, in the order of the data set."""
    total = max(1, sum(map(len, parts)))
    items: list[Item] = []
    for number, part in enumerate(parts):
        share = len(part) if sample is None else max(1, min(len(part), round(sample * len(part) / total)))
        measured = set(drawn(part, max(1, MEASURED * len(part) // total)))
        for index in sorted(drawn(part, share)):
            labels = label_file(part, index)
            files = [image_file(part, index), *([labels] if labels is not None else [])]
            if all(map(os.path.isfile, files)):
                items.append((number, index, index in measured))
    return items


def _add(
    found: Scanned, number: int, image: ImageLook, labels: LabelLook | None, classes: ClassOfNumber | None
) -> None:
    found.looks.append(image)
    tally = found.images[number]
    tally.add_head(image.file, image.head)
    if image.damaged:
        tally.damaged.append(f"{image.file} ({image.damaged})")
    if image.cut_short:
        tally.cut_short.append(image.file)
    if image.stored and not image.raster:
        tally.reduced.append((image.file, image.stored))
    if image.raster_head is not None:
        found.rasters[number][image.file] = image.raster_head
    if labels is not None and classes is not None:
        found.labels.add(labels, classes)
