"""Images with rare classes more often: mmdet's `ClassBalancedDataset`, for label maps.

In: a data set's config. Out: a data set in which an image stands as often as its rarest class asks for.
Importing this module registers it in mmseg's DATASETS. Source: Gupta et al., "LVIS", 2019, section 5.2
(repeat factor sampling).
"""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mmseg.datasets import DATASETS, CustomDataset, build_dataset
from torch.utils.data import Dataset

from internseg_ds.data.label_maps import annotation_of, loader_in
from internseg_ds.errors import ConfigError
from internseg_ds.progress import tracked

THREADS = 8


@DATASETS.register_module()
class ClassBalancedDataset(Dataset):
    """`dataset` with each image r times, r = max over its classes c of max(1, sqrt(oversample_thr / f(c))),
    rounded up; f(c): share of images with class c.

    dataset: the config of one data set. oversample_thr: share of images below which a class is rare.
    filter_empty_gt: False: images without any class are counted as a class of their own. `balance` reads all
    label maps once. Raises ConfigError for a threshold that is no share.
    """

    def __init__(
        self, dataset: Any, oversample_thr: float, filter_empty_gt: bool = True, **default_args: Any
    ) -> None:
        if (
            isinstance(oversample_thr, bool)
            or not isinstance(oversample_thr, (int, float))
            or not 0 < oversample_thr <= 1
        ):
            raise ConfigError(
                f"oversample_thr={oversample_thr!r} of ClassBalancedDataset must be a share of the images, "
                "above 0 and at most 1"
            )
        self.dataset = build_dataset(dataset, default_args or None)
        self.oversample_thr, self.filter_empty_gt = oversample_thr, filter_empty_gt
        self.CLASSES, self.PALETTE = self.dataset.CLASSES, self.dataset.PALETTE
        self.indices = list(range(len(self.dataset)))
        """The image at each place."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.dataset[self.indices[place]]

    def balance(self) -> None:
        """Reads which classes each image has. Raises ConfigError where the data set is none of mmseg's kind,
        or reads its label maps in a way of its own."""
        loader = loader_in(self.dataset) if isinstance(self.dataset, CustomDataset) else None
        if loader is None:
            raise ConfigError(
                f"ClassBalancedDataset cannot see the classes of {type(self.dataset).__name__}; give it "
                "one data set of mmseg, "
                "whose pipeline has mmseg's LoadAnnotations"
            )

        def classes(index: int) -> list[int]:
            found = np.unique(loader(annotation_of(self.dataset, index))["gt_semantic_seg"]).tolist()
            return [label for label in found if label != loader.ignore_index] or (
                [] if self.filter_empty_gt else [len(self.CLASSES)]
            )

        with ThreadPoolExecutor(THREADS) as pool:
            images = list(
                tracked(
                    pool.map(classes, range(len(self.dataset))),
                    "counting classes",
                    len(self.dataset),
                    "label maps",
                )
            )
        counts = Counter(label for labels in images for label in labels)
        rarity = {
            label: max(1.0, math.sqrt(self.oversample_thr * len(images) / count))
            for label, count in counts.items()
        }
        self.indices = [
            index
            for index, labels in enumerate(images)
            for _ in range(math.ceil(max((rarity[label] for label in labels), default=1)))
        ]
