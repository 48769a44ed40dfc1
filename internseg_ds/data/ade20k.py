"""ADE20K with the published `max_image_num` for few-shot training, as a subset that all ranks and all
restarts agree on.

In: the arguments of mmseg's ADE20KDataset. Out: a dataset; importing this module puts it in mmseg's DATASETS
in place of mmseg's own.
"""

import hashlib
from typing import Any

import mmseg.datasets
from mmseg.datasets.builder import DATASETS

from internseg_ds.errors import ConfigError


@DATASETS.register_module(force=True)
class ADE20KDataset(mmseg.datasets.ADE20KDataset):
    """mmseg's ADE20KDataset, all of it or `max_image_num` images drawn by `subset_seed`, in the order of
    their names.

    The published class shuffles without a seed, so each rank trains on another subset. Here an image's place
    in the draw is a hash of the seed and its name: independent of ranks, library versions and the order of
    files. Smaller subsets of one seed lie inside bigger ones. Raises ConfigError when `max_image_num` is
    below 1.
    """

    img_infos: list[dict[str, Any]]

    def __init__(self, max_image_num: int | None = None, subset_seed: int = 0, **kwargs: Any) -> None:
        if max_image_num is not None and max_image_num < 1:
            raise ConfigError(
                f"max_image_num={max_image_num} leaves no image to train on: give 1 or more, or None for all."
            )
        super().__init__(**kwargs)
        if max_image_num is not None:

            def place_in_draw(info: dict[str, Any]) -> bytes:
                return hashlib.sha256(f"{subset_seed} {info['filename']}".encode()).digest()

            drawn = sorted(self.img_infos, key=place_in_draw)[:max_image_num]
            self.img_infos = sorted(drawn, key=lambda info: info["filename"])
