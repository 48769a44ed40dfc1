"""How ZeRO-3 divides one parameter among ranks. Needs neither torch nor DeepSpeed.

Source: DeepSpeed 0.19.8, `runtime/zero/partition_parameters.py` (`_partition_param`): the flat parameter is
padded to a multiple of the number of ranks and cut into equal shares; rank r holds the r-th.
"""

import math
from typing import Any


def share_per_rank(numel: int, ranks: int) -> int:
    """Elements of a parameter that each rank holds, padding included."""
    return math.ceil(numel / ranks)


def padded(numel: int, multiple: int) -> int:
    """Elements after padding to a multiple: what all ranks hold together."""
    return share_per_rank(numel, multiple) * multiple


def elements_of_rank(rank: int, numel: int, share: int) -> tuple[int, int]:
    """The elements [start, stop) of a flat parameter that `rank` holds; empty for a rank that holds padding
    alone. share: `share_per_rank`."""
    start = min(rank * share, numel)
    return start, min(start + share, numel)


def full_shape(param: Any) -> Any:
    """The torch.Size of a parameter before ZeRO-3 partitioned it; of any other parameter its shape.

    runtime/zero/partition_parameters.py: `ds_shape` keeps it, while `shape` is [0] between gathers.
    """
    return getattr(param, "ds_shape", param.shape)
