"""Small trees of generated images in the folders, under the names and with the numbers of the data sets of
configs/_base_/layouts, as mmseg's converters leave them.

`TREES[layout](root, layout)` writes one below `root`; `MEANINGS[layout]` says what some of its numbers mean, from
the data sets' own documents (None: no class), and `NUMBERS[layout]` lists all that its label maps hold.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

NUMBERS = {
    "cityscapes": [*range(19), 255],
    "cityscapes_extra": [*range(19), 255],
    "mapillary": [*range(66)],
    "coco_stuff164k": [*range(171), 255],
    "coco_stuff10k": [*range(172)],
    "pascal_context_59": [*range(60)],
    "pascal_context_60": [*range(60)],
    "pascal_voc12": [*range(21), 255],
    "pascal_voc12_aug": [*range(21), 255],
    "loveda": [*range(8)],
    "potsdam": [*range(7)],
    "vaihingen": [*range(7)],
    "isaid": [*range(16), 255],
    "nyu_depth_v2": [*range(41)],
}
ISPRS = {0: None, 1: "impervious_surface", 2: "building", 4: "tree", 5: "car", 6: "clutter"}
VOC = {0: "background", 1: "aeroplane", 15: "person", 20: "tvmonitor", 255: None}
MEANINGS: dict[str, dict[int, str | None]] = {
    "cityscapes": {0: "road", 11: "person", 13: "car", 18: "bicycle", 255: None},
    "cityscapes_extra": {0: "road", 11: "person", 13: "car", 18: "bicycle", 255: None},
    "mapillary": {0: "Bird", 13: "Road", 55: "Car", 65: "Unlabeled"},
    "coco_stuff164k": {0: "person", 79: "toothbrush", 80: "banner", 170: "wood", 255: None},
    "coco_stuff10k": {0: None, 1: "person", 80: "toothbrush", 81: "banner", 171: "wood"},
    "pascal_context_59": {0: None, 1: "aeroplane", 2: "bag", 59: "wood"},
    "pascal_context_60": {0: "background", 1: "aeroplane", 2: "bag", 59: "wood"},
    "pascal_voc12": VOC,
    "pascal_voc12_aug": VOC,
    "loveda": {0: None, 1: "background", 2: "building", 3: "road", 7: "agricultural"},
    "potsdam": ISPRS,
    "vaihingen": ISPRS,
    "isaid": {0: "background", 1: "ship", 9: "Small_Vehicle", 15: "Harbor", 255: None},
    "nyu_depth_v2": {0: None, 1: "wall", 2: "floor", 40: "otherprop"},
}


def picture(path: Path, seed: int, shape: tuple[int, int]) -> None:
    """Blobs of colours about as bright and as varied as photographs."""
    coarse = np.random.default_rng(seed).normal(120, 58, (6, 8, 3)).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(shape[::-1]).save(path)


def label_map(path: Path, numbers: list[int], palette: list[int] | None = None) -> tuple[int, int]:
    """Each number in a column of its own, 4 pixels wide; behind a palette, if one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.tile(np.repeat(np.array(numbers, np.uint8), 4), (40, 1))
    image = Image.fromarray(labels)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)
    return labels.shape


def pair(image: Path, labels: Path, layout: str, seed: int, palette: list[int] | None = None) -> None:
    picture(image, seed, label_map(labels, NUMBERS[layout], palette))


def split_file(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def cityscapes(root: Path, layout: str) -> None:
    parts = [("train", "gtFine", "aachen"), ("val", "gtFine", "munster")]
    if layout == "cityscapes_extra":
        parts.append(("train_extra", "refinement_final", "augsburg"))
    for seed, (part, truth, city) in enumerate(parts):
        stem = f"{part}/{city}/{city}_000000_000019"
        pair(
            root / f"data/cityscapes/leftImg8bit/{stem}_leftImg8bit.png",
            root / f"data/cityscapes/{truth}/{stem}_gtFine_labelTrainIds.png",
            layout,
            seed,
        )
        # all ids of the annotation, which lie beside
        label_map(root / f"data/cityscapes/{truth}/{stem}_gtFine_labelIds.png", [*range(34)])


def mapillary(root: Path, layout: str) -> None:
    for seed, part in enumerate(("training", "validation")):
        folder = root / f"data/Mapillary/{part}"
        pair(folder / f"images/k{seed}_-x.jpg", folder / f"labels/k{seed}_-x.png", layout, seed, [9] * 768)


def coco(root: Path, layout: str) -> None:
    parts = ("train2014", "test2014") if layout == "coco_stuff10k" else ("train2017", "val2017")
    for seed, part in enumerate(parts):
        name = f"COCO_train2014_{seed:012d}" if layout == "coco_stuff10k" else f"{seed:012d}"
        folder = root / "data" / layout
        labels = folder / f"annotations/{part}/{name}_labelTrainIds.png"
        pair(folder / f"images/{part}/{name}.jpg", labels, layout, seed)
        if layout == "coco_stuff164k":  # what the converter read
            label_map(labels.with_name(f"{name}.png"), [*range(182)])


def pascal_context(root: Path, layout: str) -> None:
    folder = root / "data/VOCdevkit/VOC2010"
    for seed, part in enumerate(("train", "val")):
        name = f"2008_00000{seed}"
        labels = folder / f"SegmentationClassContext/{name}.png"
        pair(folder / f"JPEGImages/{name}.jpg", labels, layout, seed)
        split_file(folder / f"ImageSets/SegmentationContext/{part}.txt", [name])
    picture(folder / "JPEGImages/2010_009999.jpg", 9, (40, 40))  # of no part


def pascal_voc12(root: Path, layout: str) -> None:
    folder = root / "data/VOCdevkit/VOC2012"
    parts = [("train", "SegmentationClass"), ("val", "SegmentationClass"), ("aug", "SegmentationClassAug")]
    for seed, (part, labels) in enumerate(parts[: 3 if layout == "pascal_voc12_aug" else 2]):
        name = f"2007_00003{seed}"
        palette = [7, 7, 7] * 256 if labels == "SegmentationClass" else None
        pair(folder / f"JPEGImages/{name}.jpg", folder / f"{labels}/{name}.png", layout, seed, palette)
        split_file(folder / f"ImageSets/Segmentation/{part}.txt", [name])
    picture(folder / "JPEGImages/2012_004331.jpg", 9, (40, 40))  # of no part


def tiles(names: tuple[str, str], root_of: str, suffix: str = "") -> Callable:
    def write(root: Path, layout: str) -> None:
        for seed, (part, name) in enumerate(zip(("train", "val"), names)):
            folder = root / root_of
            labels = folder / f"ann_dir/{part}/{name}{suffix}.png"
            pair(folder / f"img_dir/{part}/{name}.png", labels, layout, seed)

    return write


def nyu_depth_v2(root: Path, layout: str) -> None:
    folder = root / "data/nyu_depth_v2"
    for seed, part in enumerate(("train", "test")):
        pair(folder / f"image/{seed + 1}.png", folder / f"label40/{seed + 1}.png", layout, seed)
        split_file(folder / f"{part}.txt", [str(seed + 1)])


TREES: dict[str, Callable[[Path, str], None]] = {
    "cityscapes": cityscapes,
    "cityscapes_extra": cityscapes,
    "mapillary": mapillary,
    "coco_stuff164k": coco,
    "coco_stuff10k": coco,
    "pascal_context_59": pascal_context,
    "pascal_context_60": pascal_context,
    "pascal_voc12": pascal_voc12,
    "pascal_voc12_aug": pascal_voc12,
    "loveda": tiles(("0", "2522"), "data/loveDA"),
    "potsdam": tiles(("2_10_0_0_512_512", "5_15_0_0_512_512"), "data/potsdam"),
    "vaihingen": tiles(("area1_0_0_512_512", "area6_0_0_512_512"), "data/vaihingen"),
    "isaid": tiles(("P0002_0_896_0_896", "P0003_0_896_0_896"), "data/iSAID", "_instance_color_RGB"),
    "nyu_depth_v2": nyu_depth_v2,
}
