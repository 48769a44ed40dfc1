"""Fine-tuning of every parameter of billion-scale vision backbones for semantic segmentation, under DeepSpeed ZeRO."""

import os
import sys
from typing import TYPE_CHECKING

from internseg_ds.allocator import set_allocators

if TYPE_CHECKING:
    from internseg_ds.engine.segmentor_engine import SegmentorEngine

if (
    os.environ.get("INTERNSEG_DEVICE") == "cpu"
):  # see `internseg_ds.device`; DeepSpeed reads its own variable when it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

set_allocators()
if sys.prefix != sys.base_prefix and os.access(
    sys.prefix, os.W_OK
):  # a virtual environment's extensions stay in it: others would compile them anew
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

__version__ = "0.1.0"
__all__ = ["SegmentorEngine", "__version__"]


def __getattr__(name: str) -> object:
    """`internseg_ds.SegmentorEngine` without loading DeepSpeed for those who only read checkpoints or data."""
    if name == "SegmentorEngine":
        from internseg_ds.engine.segmentor_engine import SegmentorEngine

        return SegmentorEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
