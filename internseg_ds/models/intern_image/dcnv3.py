"""DCNv3, the deformable convolution of InternImage, as a module with the published constructor arguments and
parameter names.

In and out: channels-last features. It computes in the dtype of its input, but for offsets and masks, which
are computed in fp32. Every module that owns parameters can draw its initial values again
(`reset_parameters`). Letters: n images, (h, w) the input's size, (h', w') the output's, c channels, g groups,
k points of a group. Source: Wang et al., "InternImage" (CVPR 2023), section 3.1, and OpenGVLab/InternImage
`segmentation/ops_dcnv3/modules/dcnv3.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internseg_ds.models.intern_image.dcnv3_geometry import Geometry, check_center
from internseg_ds.models.intern_image.dcnv3_operator import dcnv3
from internseg_ds.models.layers import XavierLinear, build_activation, build_norm, without_autocast


class Fp32Linear(nn.Linear):
    """A Linear initialised with zeros that computes in fp32 (fp64 for fp64 inputs), autocast or not: in bf16,
    an offset of 5 pixels is off by up to 1/64.

    It casts its weights in each forward, because the engine stores all parameters in one dtype. Of bf16
    weights autograd keeps the fp32 copy for the backward pass, which ZeRO-3 does not partition: some 0.3 GB
    for all of InternImage-H without activation checkpointing.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in), any float dtype -> (..., out) float32, or float64 for a float64 x."""
        compute = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            return F.linear(x.to(compute), self.weight.to(compute), self.bias.to(compute))


class DCNv3(nn.Module):
    """Deformable convolution whose offsets and masks come from a depth-wise convolution of its input.

    channels: of input and output, a multiple of group. kernel_size, stride, pad, dilation: of the sampling
    points. dw_kernel_size: of the depth-wise convolution, odd; None: kernel_size. offset_scale: factor of all
    displacements. center_feature_scale: mixes each group's result with its projected input. remove_center:
    leave the kernel's middle point out. Raises ValueError for values that contradict each other.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
    ) -> None:
        super().__init__()
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        if channels % group:
            raise ValueError(f"channels={channels} is not a multiple of group={group}")
        check_center((kernel_size, kernel_size), remove_center)
        _check_offset_positions(kernel_size, dw_kernel_size, pad, dilation)
        if center_feature_scale and stride != 1:
            raise ValueError(
                f"center_feature_scale=True needs stride=1, not {stride}: it mixes input and result "
                "position by position"
            )
        self.group = group
        self.center_feature_scale = center_feature_scale
        self.geometry = Geometry(
            kernel=(kernel_size, kernel_size),
            stride=(stride, stride),
            pad=(pad, pad),
            dilation=(dilation, dilation),
            group=group,
            offset_scale=float(offset_scale),
            remove_center=remove_center,
        )
        points = group * self.geometry.points
        self.dw_conv = nn.Sequential(
            nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                stride=stride,
                padding=dw_kernel_size // 2,
                groups=channels,
            ),
            build_norm(channels, norm_layer, "channels_first", "channels_last"),
            build_activation(act_layer),
        )
        self.offset = Fp32Linear(channels, 2 * points)
        self.mask = Fp32Linear(channels, points)
        self.input_proj = XavierLinear(channels, channels)
        self.output_proj = XavierLinear(channels, channels)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(group))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the projection of the centre's scale, where there is one; the other modules draw their own."""
        for param in self.parameters(recurse=False):
            nn.init.zeros_(param)

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, h, w, c) -> (n, h', w', c) in the same dtype; h' = ceil(h / stride), w' = ceil(w /
        stride)."""
        projected = self.input_proj(x)
        features = self.dw_conv(x.permute(0, 3, 1, 2))  # (n, h', w', c)
        # cast here, once, and not in each linear: both keep the same tensor for the backward pass
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        mask = self.mask(features).unflatten(-1, (self.group, -1)).softmax(-1).flatten(-2)
        y = dcnv3(projected, self.offset(features), mask, *self.geometry)
        if self.center_feature_scale:
            y = torch.lerp(
                y.unflatten(-1, (self.group, -1)),
                projected.unflatten(-1, (self.group, -1)),
                self._center_share(features, y.dtype),
            ).flatten(-2)
        return self.output_proj(y)

    def _center_share(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """features: (n, h, w, c) float32 or float64 -> the share of the projected input in each group's
        result, (n, h, w, g, 1) in `dtype`, computed in the dtype of the features."""
        with without_autocast(features):
            weight = self.center_feature_scale_proj_weight.to(features.dtype)
            bias = self.center_feature_scale_proj_bias.to(features.dtype)
            return F.linear(features, weight, bias).sigmoid().to(dtype).unsqueeze(-1)


def _check_offset_positions(kernel_size: int, dw_kernel_size: int, pad: int, dilation: int) -> None:
    """Raise ValueError where the depth-wise convolution, which makes the offsets, has other output
    positions than the sampling that they are for."""
    if dw_kernel_size % 2 == 0:
        raise ValueError(
            f"dw_kernel_size={dw_kernel_size} is even: offsets would lie between the positions they "
            "belong to; use an odd one"
        )
    if 2 * pad != dilation * (kernel_size - 1):
        raise ValueError(
            f"pad={pad} does not keep the size with kernel_size={kernel_size} and dilation={dilation}, "
            "as the depth-wise convolution does; pad must be dilation * (kernel_size - 1) / 2"
        )
