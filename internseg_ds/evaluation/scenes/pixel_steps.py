"""A test pipeline for a part of a scene: its steps that change the values of pixels, without those that change the
image's size.

In: a part of a scene as its raster file has it. Out: the part as launch/test.py would hand it to the model, in a scene
of its own size. Scenes are segmented at the resolution that they have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmcv.parallel import DataContainer
from mmseg.datasets.pipelines import MultiScaleFlipAug, Pad
from torch import Tensor

from internseg_ds.data.image_files import ImageFiles, as_loaded
from internseg_ds.errors import ConfigError, DataError, reason_of
from internseg_ds.evaluation.scenes.channels import Loading, RasterLoading, loading_of

CHANGE_SIZE = ("Resize", "SETR_Resize", "ResizeToMultiple", "RandomFlip")
"""Steps that are left out; of `RandomFlip`, what `MultiScaleFlipAug` asks for with flip=False is nothing."""


@dataclass(frozen=True)
class PixelSteps:
    """The steps of a test pipeline that are left for a part of a scene."""

    loading: Loading
    steps: Sequence[Any]
    pads: Sequence[Pad]
    left_out: Sequence[str]
    """Names of the steps that would change the size of the image."""

    @classmethod
    def of(cls, pipeline: Sequence[dict[str, Any]]) -> "PixelSteps":
        """pipeline: of data.test. Raises ConfigError for one that cannot be built, or looks at several views of an
        image (test-time augmentation), which scenes have not."""
        first, *steps = ImageFiles([], pipeline).pipeline.transforms
        found: list[Any] = []
        own_size = False
        for step in steps:
            found += _only_view(step) if isinstance(step, MultiScaleFlipAug) else [step]
            own_size |= (
                isinstance(step, MultiScaleFlipAug) and step.img_scale is None and step.img_ratios == [1.0]
            )
        kept = [step for step in found if type(step).__name__ not in CHANGE_SIZE]
        left_out = [type(step).__name__ for step in found if step not in kept]
        nothing = {"RandomFlip", "Resize"} if own_size else {"RandomFlip"}
        return cls(
            loading_of(first),
            [step for step in kept if not isinstance(step, Pad)],
            [step for step in kept if isinstance(step, Pad)],
            [name for name in left_out if name not in nothing],
        )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size that the pipeline pads an image to."""
        for pad in self.pads:
            if pad.size is not None:
                height, width = max(height, pad.size[0]), max(width, pad.size[1])
            else:
                height, width = (-(-side // pad.size_divisor) * pad.size_divisor for side in (height, width))
        return height, width

    def pad(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """pixels: (channels, h, w) -> (channels, h + rows, w + columns), as the pipeline pads."""
        value = torch.as_tensor(self.pads[0].pad_val, dtype=torch.float32).reshape(-1, 1, 1)
        channels, height, width = pixels.shape
        padded = value.repeat(channels // len(value), height + rows, width + columns)
        padded[:, :height, :width] = pixels
        return padded

    def __call__(self, pixels: np.ndarray, name: str) -> tuple[Tensor, dict[str, Any]]:
        """pixels: (h, w, channels) or (h, w), as the pipeline's first step would load it -> (channels, h, w) float32,
        and the img_meta. name: of the scene. Raises DataError where a step fails."""
        results: dict[str, Any] = {
            "img_info": {"filename": name, "pixels": pixels},
            "img_prefix": None,
            "seg_fields": [],
        }
        results = as_loaded(
            results, self.loading.as_float, raster=isinstance(self.loading, RasterLoading)
        ) | {"flip": False, "flip_direction": "horizontal"}
        try:
            for step in self.steps:
                results = step(results)
        except DataError:
            raise
        except Exception as error:  # whatever a transform refuses with
            shape = " x ".join(map(str, pixels.shape))
            raise DataError(
                f"a part of {name}, {shape} of {pixels.dtype}, does not go through the pipeline of data.test: "
                f"{reason_of(error)}; has the scene the channels that the model was trained on?"
            ) from error
        image, meta = (_unpacked(results[key]) for key in ("img", "img_metas"))
        found = torch.as_tensor(image).float()
        if found.shape[1:] != pixels.shape[:2]:
            raise ConfigError(
                f"the pipeline of data.test makes {tuple(found.shape[1:])} of {pixels.shape[:2]} pixels; scenes are "
                "segmented at the size that they have: take the step out that changes it"
            )
        return found, meta


def _only_view(step: MultiScaleFlipAug) -> list[Any]:
    """The steps inside. Raises ConfigError where there are several views."""
    scales = len(step.img_ratios or ()) if step.img_scale is None else len(step.img_scale)
    if step.flip or scales > 1:
        what = f"{scales} scales" if scales > 1 else "flip=True"
        raise ConfigError(
            f"MultiScaleFlipAug of data.test's pipeline has {what}, and scenes are segmented in one view; write "
            "flip=False and one img_scale (--cfg-options data.test.pipeline.1.flip=False)"
        )
    return list(step.transforms.transforms)


def _unpacked(value: Any) -> Any:
    value = value[0] if isinstance(value, list) else value
    return value.data if isinstance(value, DataContainer) else value
