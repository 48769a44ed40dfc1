"""mmseg's `BEiT` and `MAE`, whose relative-position bias tables are resized to another image size without
`scipy.interpolate.interp2d`, which SciPy 1.14 removed.

In: weight files, read by mmseg's own `init_weights`. Out: bias tables at the model's size. The replaced
method is private to mmseg; tests/models/test_beit.py fails when mmseg no longer calls it. Source: Bao et al.,
"BEiT", 2022, and microsoft/unilm `beit/semantic_segmentation/mmcv_custom/checkpoint.py`.
"""

import mmseg.models.backbones
import numpy as np
import torch
from mmseg.models.builder import BACKBONES
from scipy.interpolate import RectBivariateSpline
from torch import Tensor


def resize_bias_table(table: Tensor, side: int) -> Tensor:
    """Resize a relative-position bias table.

    table: (s * s, heads), any float dtype; its s positions per axis are the offsets -(s // 2) to s // 2.
    Returns (side * side, heads) in the same dtype.

    The known positions are placed so that their distances grow by a constant ratio from the middle outwards
    and the outermost reach the new edge: biases near the middle stay where they are. Between them the values
    are interpolated by cubic splines.
    """
    known = round(len(table) ** 0.5)
    positions = geometric_positions(known // 2, side // 2)
    wanted = np.arange(-(side // 2), side // 2 + 1, dtype=np.float64)
    order = min(3, known - 1)  # a spline of order k needs k + 1 positions
    columns = []
    for head in table.double().unbind(1):
        values = head.view(known, known).numpy()
        spline = RectBivariateSpline(positions, positions, values, kx=order, ky=order)
        columns.append(torch.from_numpy(spline(wanted, wanted).ravel()))
    return torch.stack(columns, 1).to(table)


def geometric_positions(steps: int, reach: int) -> np.ndarray:
    """Positions -d_n, ..., -d_1, 0, d_1, ..., d_n with n = steps and d_k = 1 + q + ... + q^(k-1), (2 n + 1)
    float64.

    q is found by bisection between 1.01 and 1.5, the bounds of the published code, so that d_n is close to
    `reach`.
    """
    low = 1.01
    high = 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:  # d_n of this ratio
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(steps))
    return np.concatenate([-distances[::-1], [0.0], distances])


class _SplineResizing:
    def _geometric_sequence_interpolation(
        self, src_size: int, dst_size: int, sequence: Tensor, num: int
    ) -> Tensor:
        """mmseg's method of this name. sequence: (src_size ** 2, num) -> (dst_size ** 2, num)."""
        return resize_bias_table(sequence, dst_size)


@BACKBONES.register_module(force=True)
class BEiT(_SplineResizing, mmseg.models.backbones.BEiT):
    """mmseg's class, with its constructor arguments."""


@BACKBONES.register_module(force=True)
class MAE(_SplineResizing, mmseg.models.backbones.MAE):
    """mmseg's class, with its constructor arguments."""
