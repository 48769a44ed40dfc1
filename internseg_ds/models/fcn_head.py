"""`FCNHead` as InternVL published it: mmseg's head of that name, which this one replaces in the registry,
with two more uses.

num_convs=0 leaves the features as they are (a linear probe), and with_norm normalises them over the batch
before the classifier. Source of names and order: OpenGVLab/InternVL
`segmentation/mmseg_custom/models/decode_heads/fcn_head.py`. Letters: b images, (h, w) a feature map's size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmseg.models.builder import HEADS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn


@HEADS.register_module(force=True)
class FCNHead(BaseDecodeHead):
    """Convolutions, an optional batch norm over all ranks, and a 1x1 classifier (Long et al., "Fully
    Convolutional Networks", 2015).

    num_convs: number of convolutions (kernel_size, dilation) before the classifier, 0 for none. concat_input:
    one more convolution over input and result. with_norm: SyncBatchNorm before the classifier. Further
    arguments are BaseDecodeHead's. Raises ValueError when num_convs=0 would have to change the number of
    channels, and for a dilation below 1.
    """

    def __init__(
        self,
        num_convs: int = 2,
        kernel_size: int = 3,
        concat_input: bool = True,
        dilation: int = 1,
        with_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_convs < 0 or (num_convs == 0 and self.in_channels != self.channels):
            raise ValueError(
                f"num_convs={num_convs} cannot turn in_channels={self.in_channels} into "
                f"channels={self.channels}; make them equal or add a convolution"
            )
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be 1 or more")
        self.num_convs = num_convs
        self.concat_input = concat_input
        convs = [
            self._conv(self.in_channels if index == 0 else self.channels, kernel_size, dilation)
            for index in range(num_convs)
        ]
        self.convs = nn.Sequential(*convs) if convs else nn.Identity()
        if concat_input:
            self.conv_cat = self._conv(self.in_channels + self.channels, kernel_size, dilation=1)
        self.norm = nn.SyncBatchNorm(self.channels) if with_norm else nn.Identity()

    def _conv(self, in_channels: int, kernel_size: int, dilation: int) -> ConvModule:
        """A convolution to `self.channels` channels that keeps the size of the map."""
        return ConvModule(
            in_channels,
            self.channels,
            kernel_size,
            padding=kernel_size // 2 * dilation,
            dilation=dilation,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """inputs: the backbone's maps, of which `in_index` selects (b, in_channels, h, w). Returns logits (b,
        num_classes, h, w) in the same dtype."""
        return self.cls_seg(self.norm(self._forward_feature(inputs)))

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """inputs: as of `forward` -> the features before the norm and the classifier, (b, channels, h, w).

        mmseg's K-Net head calls the method by this name.
        """
        x = self._transform_inputs(inputs)
        features = self.convs(x)  # (b, in_channels, h, w) -> (b, channels, h, w)
        if self.concat_input:
            features = self.conv_cat(torch.cat([x, features], dim=1))
        return features
