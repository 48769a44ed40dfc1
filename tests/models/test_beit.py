"""Tables of relative positions at another size, against functions that cubic splines reproduce exactly."""

import inspect

import mmseg.models.backbones
import numpy as np
import pytest
import torch
from mmseg.models.builder import BACKBONES

from internseg_ds.models.beit import MAE, BEiT, geometric_positions, resize_bias_table


def cubic(places: np.ndarray) -> torch.Tensor:
    rows, columns = np.meshgrid(places, places, indexing="ij")
    return torch.from_numpy(
        np.stack([0.3 * rows**3 - 2 * rows * columns + columns**2, rows - 0.5 * columns**3], -1).reshape(
            -1, 2
        )
    )


@pytest.mark.parametrize(("known", "side"), [(27, 79), (7, 15), (27, 31)])
def test_a_cubic_function_of_the_positions_stays_that_function(known, side):
    places, wanted = geometric_positions(known // 2, side // 2), np.arange(-(side // 2), side // 2 + 1.0)
    resized = resize_bias_table(cubic(places), side).view(side, side, 2)
    # beyond the last place the edge goes on
    inside = slice((skipped := int((abs(wanted) > places[-1]).sum()) // 2), side - skipped)
    torch.testing.assert_close(
        resized[inside, inside],
        cubic(wanted[inside]).view(side - 2 * skipped, side - 2 * skipped, 2),
        rtol=1e-9,
        atol=1e-6,
    )


def test_places_grow_by_one_ratio_from_the_middle_to_the_new_edge():
    places = geometric_positions(13, 39)
    assert (
        places[13] == 0
        and places[14] == 1
        and np.allclose(places, -places[::-1])
        and abs(places[-1] - 39) < 1e-3
    )
    steps = np.diff(places[13:])
    assert np.allclose(steps[1:] / steps[:-1], steps[1] / steps[0])


def test_the_middle_of_a_table_stays_where_it_is():
    table = torch.randn(27 * 27, 3, generator=torch.Generator().manual_seed(0))
    resized = resize_bias_table(table, 79).view(79, 79, 3)
    torch.testing.assert_close(resized[39, 39], table.view(27, 27, 3)[13, 13])
    # one step away is one step away in both
    torch.testing.assert_close(resized[40, 39], table.view(27, 27, 3)[14, 13])


@pytest.mark.parametrize(
    ("ours", "theirs"), [(BEiT, mmseg.models.backbones.BEiT), (MAE, mmseg.models.backbones.MAE)]
)
def test_mmseg_still_calls_the_method_that_is_replaced(ours, theirs):
    assert BACKBONES.get(theirs.__name__) is ours
    assert "self._geometric_sequence_interpolation(" in inspect.getsource(theirs.resize_rel_pos_embed)
    assert list(inspect.signature(theirs._geometric_sequence_interpolation).parameters) == [
        "self",
        "src_size",
        "dst_size",
        "sequence",
        "num",
    ]
