"""Adaptive average pooling as two products of matrices, one for each side: ONNX has no such operator, and torch's
translation needs sizes that are known and divide each other.

Letters: b images, c channels, (h, w) the input's size, (h', w') the output's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """As `torch.nn.functional.adaptive_avg_pool2d`, of x (b, c, h, w) any float dtype, without gradients in mind:
    (b, c, h', w') in the same dtype."""
    rows = _means(x.size(-2), output_size[0], x)
    columns = _means(x.size(-1), output_size[1], x)
    return rows @ x @ columns.mT


def _means(size: int, parts: int, like: Tensor) -> Tensor:
    """Row i of the matrix (parts, size), in the dtype of `like`, takes the mean of elements floor(i size / parts) to
    ceil((i + 1) size / parts) - 1, which is how torch divides a side."""
    part = torch.arange(parts, device=like.device)
    begins = (part * size).div(parts, rounding_mode="floor")[:, None]
    ends = ((part + 1) * size + parts - 1).div(parts, rounding_mode="floor")[:, None]
    places = torch.arange(size, device=like.device)
    inside = ((places >= begins) & (places < ends)).to(like.dtype)
    return inside / (ends - begins).to(like.dtype)
