"""Small data sets in mmseg's layout, with whatever is to be wrong with them."""

import numpy as np
from PIL import Image

from tests.data.test_label_maps import TEST, TRAIN


def entry(kind, root, part, /, **arguments):
    return dict(
        type=kind,
        data_root=str(root),
        img_dir=f"images/{part}",
        ann_dir=f"labels/{part}",
        pipeline=TRAIN if part == "train" else TEST,
        **arguments,
    )


TWO = dict(classes=["road", "car"], palette=[[9, 9, 9], [200, 0, 0]])


def write(root, split, rows, *, image=".jpg", labels=".png", exif=1, palette=None):
    """Random images, and label maps with a row of these numbers each, 4 rows high."""
    generator = np.random.default_rng(len(split))
    for index, row in enumerate(rows):
        numbers = np.tile(np.array(row, np.uint8), (4, 1))
        paths = [root / folder / split / str(index) for folder in ("images", "labels")]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(generator.integers(0, 255, (*numbers.shape, 3), dtype=np.uint8))
        tags = picture.getexif()
        tags[0x0112] = exif
        picture.save(f"{paths[0]}{image}", exif=tags)
        drawn = Image.fromarray(numbers)
        if palette is not None:
            drawn.putpalette(palette)
        drawn.save(f"{paths[1]}{labels}")


def sound(root):
    for split in ("train", "val"):
        write(root, split, [[0, 1, 255], [1, 1, 0], [0, 0, 1]])


def names(report):
    return {finding.name for finding in report.wrong}
