"""The data sets that InternImage's configs name and mmseg 0.30 lacks: NYU Depth V2 and Mapillary Vistas, and
the relabelling of the latter.

Importing this module registers them in mmseg's DATASETS and PIPELINES.
"""

from typing import Any

import numpy as np
from mmseg.datasets import ADE20KDataset, CityscapesDataset, CustomDataset
from mmseg.datasets.builder import DATASETS, PIPELINES


@DATASETS.register_module()
class NYUDepthV2Dataset(CustomDataset):
    """Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", 2012, with the 40
    classes of Gupta et al., 2013.

    Images and label maps are .png of the same name; 0 stands for no class (reduce_zero_label). split: the
    file that lists the names of this part.
    """

    CLASSES = (
        "wall",
        "floor",
        "cabinet",
        "bed",
        "chair",
        "sofa",
        "table",
        "door",
        "window",
        "bookshelf",
        "picture",
        "counter",
        "blinds",
        "desk",
        "shelves",
        "curtain",
        "dresser",
        "pillow",
        "mirror",
        "floor mat",
        "clothes",
        "ceiling",
        "books",
        "refridgerator",
        "television",
        "paper",
        "towel",
        "shower curtain",
        "box",
        "whiteboard",
        "person",
        "night stand",
        "toilet",
        "sink",
        "lamp",
        "bathtub",
        "bag",
        "otherstructure",
        "otherfurniture",
        "otherprop",
    )
    PALETTE = ADE20KDataset.PALETTE[: len(CLASSES)]

    def __init__(self, split: str, **kwargs: Any) -> None:
        super().__init__(
            img_suffix=".png", seg_map_suffix=".png", split=split, reduce_zero_label=True, **kwargs
        )


@DATASETS.register_module()
class MapillaryDataset(CustomDataset):
    """Neuhold et al., "The Mapillary Vistas Dataset", 2017, version 1.2: 66 classes, the last of which is
    "Unlabeled". Images .jpg, label maps .png."""

    CLASSES = (
        "Bird",
        "Ground Animal",
        "Curb",
        "Fence",
        "Guard Rail",
        "Barrier",
        "Wall",
        "Bike Lane",
        "Crosswalk - Plain",
        "Curb Cut",
        "Parking",
        "Pedestrian Area",
        "Rail Track",
        "Road",
        "Service Lane",
        "Sidewalk",
        "Bridge",
        "Building",
        "Tunnel",
        "Person",
        "Bicyclist",
        "Motorcyclist",
        "Other Rider",
        "Lane Marking - Crosswalk",
        "Lane Marking - General",
        "Mountain",
        "Sand",
        "Sky",
        "Snow",
        "Terrain",
        "Vegetation",
        "Water",
        "Banner",
        "Bench",
        "Bike Rack",
        "Billboard",
        "Catch Basin",
        "CCTV Camera",
        "Fire Hydrant",
        "Junction Box",
        "Mailbox",
        "Manhole",
        "Phone Booth",
        "Pothole",
        "Street Light",
        "Pole",
        "Traffic Sign Frame",
        "Utility Pole",
        "Traffic Light",
        "Traffic Sign (Back)",
        "Traffic Sign (Front)",
        "Trash Can",
        "Bicycle",
        "Boat",
        "Bus",
        "Car",
        "Caravan",
        "Motorcycle",
        "On Rails",
        "Other Vehicle",
        "Trailer",
        "Truck",
        "Wheeled Slow",
        "Car Mount",
        "Ego Vehicle",
        "Unlabeled",
    )
    PALETTE = [
        [165, 42, 42],
        [0, 192, 0],
        [196, 196, 196],
        [190, 153, 153],
        [180, 165, 180],
        [90, 120, 150],
        [102, 102, 156],
        [128, 64, 255],
        [140, 140, 200],
        [170, 170, 170],
        [250, 170, 160],
        [96, 96, 96],
        [230, 150, 140],
        [128, 64, 128],
        [110, 110, 110],
        [244, 35, 232],
        [150, 100, 100],
        [70, 70, 70],
        [150, 120, 90],
        [220, 20, 60],
        [255, 0, 0],
        [255, 0, 100],
        [255, 0, 200],
        [200, 128, 128],
        [255, 255, 255],
        [64, 170, 64],
        [230, 160, 50],
        [70, 130, 180],
        [190, 255, 255],
        [152, 251, 152],
        [107, 142, 35],
        [0, 170, 30],
        [255, 255, 128],
        [250, 0, 30],
        [100, 140, 180],
        [220, 220, 220],
        [220, 128, 128],
        [222, 40, 40],
        [100, 170, 30],
        [40, 40, 40],
        [33, 33, 33],
        [100, 128, 160],
        [142, 0, 0],
        [70, 100, 150],
        [210, 170, 100],
        [153, 153, 153],
        [128, 128, 128],
        [0, 0, 80],
        [250, 170, 30],
        [192, 192, 192],
        [220, 220, 0],
        [140, 140, 20],
        [119, 11, 32],
        [150, 0, 255],
        [0, 60, 100],
        [0, 0, 142],
        [0, 0, 90],
        [0, 0, 230],
        [0, 80, 100],
        [128, 64, 64],
        [0, 0, 110],
        [0, 0, 70],
        [0, 0, 192],
        [32, 32, 32],
        [120, 10, 10],
        [0, 0, 0],
    ]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(img_suffix=".jpg", seg_map_suffix=".png", reduce_zero_label=False, **kwargs)


CITYSCAPES_OF_MAPILLARY = {
    "road": ("Road", "Lane Marking - General", "Manhole"),
    "sidewalk": ("Curb", "Sidewalk"),
    "building": ("Building",),
    "wall": ("Wall",),
    "fence": ("Fence",),
    "pole": ("Pole", "Utility Pole"),
    "traffic light": ("Traffic Light",),
    "traffic sign": ("Traffic Sign (Front)",),
    "vegetation": ("Vegetation",),
    "terrain": ("Terrain",),
    "sky": ("Sky",),
    "person": ("Person",),
    "rider": ("Bicyclist", "Motorcyclist", "Other Rider"),
    "car": ("Car",),
    "truck": ("Truck",),
    "bus": ("Bus",),
    "train": ("On Rails",),
    "motorcycle": ("Motorcycle",),
    "bicycle": ("Bicycle",),
}
"""The classes of Mapillary that InternImage takes for one of Cityscapes; the others count as none."""


@PIPELINES.register_module()
class MapillaryHack:
    """Turns Mapillary's 66 classes in gt_semantic_seg into the 19 of Cityscapes, and into 255 what is none of
    them. Stands behind LoadAnnotations."""

    CLASSES, PALETTE = CityscapesDataset.CLASSES, CityscapesDataset.PALETTE
    """What labels mean from here on."""

    def __init__(self) -> None:
        self.table = np.full(256, 255, np.uint8)
        for name, theirs in CITYSCAPES_OF_MAPILLARY.items():
            self.table[[MapillaryDataset.CLASSES.index(other) for other in theirs]] = self.CLASSES.index(name)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results["gt_semantic_seg"] = self.table[results["gt_semantic_seg"]]
        return results
