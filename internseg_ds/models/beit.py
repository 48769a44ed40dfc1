"""mmseg's `BEiT` and `MAE`, whose tables of relative positions are brought to another image size without a function that SciPy 1.14 has taken away.

In: weight files, by mmseg's own `init_weights`. Out: tables at the model's size. mmseg calls the method that is replaced here by a private name;
tests/models/test_beit.py tells when it does so no more.
Source: Bao et al., "BEiT", 2022, and microsoft/unilm `beit/semantic_segmentation/mmcv_custom/checkpoint.py`.
"""

import mmseg.models.backbones
import numpy as np
import torch
from mmseg.models.builder import BACKBONES
from scipy.interpolate import RectBivariateSpline
from torch import Tensor


def resize_bias_table(table: Tensor, side: int) -> Tensor:
    """A table (s * s, heads) of biases by relative position, -(s // 2) to s // 2 in each direction, brought to (side * side, heads), in its dtype.

    The known positions are spread so that distances grow by a constant ratio from the middle outwards, where they reach the new edge: near the middle biases
    stay where they are. Between them lie cubic splines.
    """
    known = round(len(table) ** 0.5)
    places, wanted = spread(known // 2, side // 2), np.arange(-(side // 2), side // 2 + 1, dtype=np.float64)
    columns = []
    for head in table.double().unbind(1):
        order = min(3, known - 1)
        spline = RectBivariateSpline(places, places, head.view(known, known).numpy(), kx=order, ky=order)
        columns.append(torch.from_numpy(spline(wanted, wanted).ravel()))
    return torch.stack(columns, 1).to(table)


def spread(steps: int, reach: int) -> np.ndarray:
    """Places -d_n, ..., -d_1, 0, d_1, ..., d_n (n = steps) with d_k = 1 + q + ... + q^(k-1), and q between 1.01 and 1.5 so that d_n comes next to `reach`."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**steps) / (1 - ratio) > reach else (ratio, high)
    distances = np.cumsum(ratio ** np.arange(steps))
    return np.concatenate([-distances[::-1], [0.0], distances])


class _Resizing:
    def _geometric_sequence_interpolation(
        self, src_size: int, dst_size: int, sequence: Tensor, num: int
    ) -> Tensor:
        """mmseg's method of this name: sequence (src_size ** 2, num) -> (dst_size ** 2, num)."""
        return resize_bias_table(sequence, dst_size)


@BACKBONES.register_module(force=True)
class BEiT(_Resizing, mmseg.models.backbones.BEiT):
    """mmseg's class."""


@BACKBONES.register_module(force=True)
class MAE(_Resizing, mmseg.models.backbones.MAE):
    """mmseg's class."""
