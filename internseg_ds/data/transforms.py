"""The transforms that the published configs name and mmseg 0.30 lacks: `SETR_Resize` (InternVL) and `ToMask`
(InternImage's Mask2Former).

In: mmseg's results dict of one image. Out: the same dict, changed. Importing this module registers both in
mmseg's PIPELINES. `ResizeToMultiple`, which the same configs name, is mmseg's own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmcv.parallel import DataContainer
from mmseg.datasets.builder import PIPELINES
from mmseg.datasets.pipelines import Resize

from internseg_ds.errors import ConfigError


@PIPELINES.register_module(force=True)
class SETR_Resize(Resize):  # the name that published configs use
    """mmseg's `Resize` whose short side is never less than the sliding window, when asked for.

    crop_size: (height, width) in pixels; only its height counts, as published. With setr_multi_scale and
    keep_ratio the short side becomes max(min(scale), crop_size[0]), however long the other side gets;
    otherwise this is `Resize`, which also takes the other arguments.
    """

    def __init__(
        self, crop_size: Sequence[int] | None = None, setr_multi_scale: bool = False, **resize: Any
    ) -> None:
        min_size = None
        if setr_multi_scale:
            if crop_size is None:
                raise ConfigError(
                    "SETR_Resize has setr_multi_scale=True but no crop_size: add crop_size=(height, width), "
                    "the sliding window."
                )
            min_size = crop_size[0]
        super().__init__(min_size=min_size, **resize)


@PIPELINES.register_module(force=True)
class ToMask:
    """One binary mask for each class in the image, the targets of mask classification.

    Reads gt_semantic_seg (h, w), so it belongs after the last transform of the geometry. Adds gt_labels (n)
    int64, ascending, without ignore_index, and gt_masks (n, h, w) uint8, both as DataContainers of tensors,
    which DefaultFormatBundle leaves alone. n may be 0.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        segmentation = results["gt_semantic_seg"]
        labels = np.setdiff1d(segmentation, self.ignore_index).astype(np.int64)
        masks = (segmentation[None] == labels[:, None, None]).astype(np.uint8)
        results["gt_labels"] = DataContainer(torch.from_numpy(labels))
        results["gt_masks"] = DataContainer(torch.from_numpy(masks))
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ignore_index={self.ignore_index})"
