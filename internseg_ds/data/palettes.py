"""Label maps that are pictures with a palette: their numbers are classes, unless a decoder makes colours of
them.

In: one of mmseg's data sets. Out: nothing, or a ConfigError that names the file and the setting.
"""

import os

from mmseg.datasets import CustomDataset
from mmseg.datasets.pipelines import LoadAnnotations

from internseg_ds.data.label_maps import annotation_of
from internseg_ds.errors import ConfigError

LOOKED_AT = 20
"""Label maps whose heads are read."""
SIGNATURE, COLOUR_TYPE, PALETTE = b"\x89PNG\r\n\x1a\n", 25, 3
"""The first bytes of a PNG, the place of its colour type, and the type of one with a palette (PNG
specification)."""


def check_decoder(dataset: CustomDataset, what: str) -> None:
    """OpenCV turns a palette's numbers into its colours. Raises ConfigError where it is to read such a file.

    what: the data set's name in messages.
    """
    loaders = [step for step in dataset.pipeline.transforms if isinstance(step, LoadAnnotations)]
    loaders += [loader] if (loader := getattr(dataset, "gt_seg_map_loader", None)) is not None else []
    if dataset.ann_dir is None or not any(
        getattr(loader, "imdecode_backend", None) == "cv2" for loader in loaders
    ):
        return
    for index in (index for index, info in enumerate(dataset.img_infos[:LOOKED_AT]) if "ann" in info):
        results = annotation_of(dataset, index)
        file = os.path.join(results.get("seg_prefix") or "", results["ann_info"]["seg_map"])
        if os.path.isfile(file) and _has_palette(file):
            raise ConfigError(
                f"{what}: label map {file} has a palette, of which imdecode_backend='cv2' of "
                "LoadAnnotations (or of "
                "gt_seg_map_loader_cfg) makes colours; leave imdecode_backend out, and its numbers are "
                "read as classes"
            )


def _has_palette(file: str) -> bool:
    with open(file, "rb") as opened:
        head = opened.read(COLOUR_TYPE + 1)
    return head.startswith(SIGNATURE) and head[COLOUR_TYPE:] == bytes([PALETTE])
