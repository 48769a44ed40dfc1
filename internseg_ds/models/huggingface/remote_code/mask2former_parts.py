"""transformers' Mask2Former over a backbone that a folder brings. It needs torch and transformers alone; a file
modeling_*.py beside it has the backbone.

Letters: b images, (h, w) a size, k classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, Mask2FormerConfig, PretrainedConfig, PreTrainedModel
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former
from transformers.modeling_outputs import BackboneOutput

from .segmentation_parts import WindowedLogits, draw_tables, padded_to, resized


class BroughtBackboneConfig(PretrainedConfig):
    """settings: arguments of the backbone. in_index: of its maps, which the head takes. channels: of these.
    patch_size: (vertical, horizontal) pixels; sides of images are padded to multiples of them."""

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        in_index: Sequence[int] = (0, 1, 2, 3),
        channels: Sequence[int] = (),
        patch_size: Sequence[int] = (1, 1),
        **kwargs: Any,
    ) -> None:
        self.settings = dict(settings or {})
        self.in_index = list(in_index)
        self.channels = list(channels)
        self.patch_size = list(patch_size)
        super().__init__(**kwargs)


class BroughtBackbone(PreTrainedModel):
    """The maps of a backbone, as transformers' heads take them."""

    _supports_sdpa = True

    def __init__(self, config: BroughtBackboneConfig) -> None:
        super().__init__(config)
        self.body = self.build_backbone(**config.settings)
        self.channels = list(config.channels)
        self.post_init()

    def build_backbone(self, **settings: Any) -> nn.Module:
        """The module that makes maps (b, c, h', w') of images (b, 3, h, w)."""
        raise NotImplementedError

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        draw_tables(module)

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        maps = self.body(padded_to(self.config.patch_size, pixel_values))
        return BackboneOutput(feature_maps=tuple(maps[index] for index in self.config.in_index))


class Mask2FormerWithCodeConfig(Mask2FormerConfig):
    """window_size, window_stride: (vertical, horizontal) pixels of the windows of `windowed_logits`; None: whole
    images. palette: a colour (r, g, b) for each class."""

    window_size: list[int] | None = None
    window_stride: list[int] | None = None
    palette: list[list[int]] | None = None


class Mask2FormerWithCode(WindowedLogits, Mask2Former):
    """Mask2Former, and its logits of pixels."""

    def forward(self, pixel_values: Tensor, **arguments: Any) -> Any:
        """As transformers'. Where an image was padded for the backbone, masks end with the image, to the nearest
        pixel of a mask."""
        outputs = super().forward(pixel_values, **arguments)
        height, width = padded_to(self.config.backbone_config.patch_size, pixel_values).shape[2:]
        if (height, width) != pixel_values.shape[2:] and hasattr(outputs, "masks_queries_logits"):
            masks = outputs.masks_queries_logits
            rows = round(masks.size(2) * pixel_values.size(2) / height)
            columns = round(masks.size(3) * pixel_values.size(3) / width)
            outputs.masks_queries_logits = masks[:, :, :rows, :columns]
        return outputs

    @torch.no_grad()
    def whole_logits(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (b, 3, h, w) -> (b, k, h, w) float32: the sum over queries of mask times class probability."""
        padded = padded_to(self.config.backbone_config.patch_size, pixel_values)
        outputs = self(padded)
        classes = outputs.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = outputs.masks_queries_logits.float().sigmoid()
        logits = resized(torch.einsum("bqk,bqhw->bkhw", classes, masks), padded, align_corners=False)
        return logits[:, :, : pixel_values.size(2), : pixel_values.size(3)]


def register(config: type[BroughtBackboneConfig], backbone: type[BroughtBackbone]) -> None:
    """Makes a backbone known to transformers in this process."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoBackbone.register(config, backbone, exist_ok=True)
