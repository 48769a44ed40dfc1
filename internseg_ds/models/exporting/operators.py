"""What an exported program has in the place of operators that no format but Python's knows.

In: nothing. Out: operator of torch -> a function with its signature, made of operations that ONNX and TorchScript
have too, for sizes that may be known at run time only. The models themselves are not changed for an export.
"""

from collections.abc import Callable
from typing import Any

import torch

from internseg_ds.models.exporting.adaptive_pooling import adaptive_avg_pool
from internseg_ds.models.intern_image.dcnv3_grid_sample import dcnv3
from internseg_ds.models.sampling.deformable_attention_torch import deformable_attention


def portable_operators() -> dict[Any, Callable]:
    """The table that `torch.export.ExportedProgram.run_decompositions` takes."""
    return {
        torch.ops.internseg_ds.dcnv3.default: dcnv3,
        torch.ops.internseg_ds.deformable_attention.default: deformable_attention,
        torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
        torch.ops.aten._adaptive_avg_pool2d.default: adaptive_avg_pool,
    }
