"""Fine-tuning of every parameter of billion-scale vision backbones for semantic segmentation, under DeepSpeed
ZeRO."""

import os
import sys
from typing import TYPE_CHECKING

from internseg_ds.allocator import set_allocators
from internseg_ds.version import VERSION

if TYPE_CHECKING:
    from internseg_ds.evaluation.segmenter import Segmenter
    from internseg_ds.training.segmentor_engine import SegmentorEngine

# see `internseg_ds.device`; DeepSpeed reads its own variable when it is imported
if os.environ.get("INTERNSEG_DEVICE") == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

set_allocators()
# a virtual environment's extensions stay in it: others would compile them anew
if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

__version__ = VERSION
__all__ = ["Segmenter", "SegmentorEngine", "__version__"]


def __getattr__(name: str) -> object:
    """`internseg_ds.SegmentorEngine` and `internseg_ds.Segmenter` without loading DeepSpeed for those who only read
    checkpoints or data."""
    if name == "SegmentorEngine":
        from internseg_ds.training.segmentor_engine import SegmentorEngine

        return SegmentorEngine
    if name == "Segmenter":
        from internseg_ds.evaluation.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
