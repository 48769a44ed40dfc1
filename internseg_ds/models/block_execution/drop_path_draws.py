"""Drop-path in compiled blocks: which images keep a branch is drawn by an operation of its own, which takes the
probability as a tensor.

The probability differs from block to block. As a number it would become part of the compiled code, which each
block would then need a copy of.
"""

from typing import Any

import torch
from torch import Tensor, nn

from internseg_ds.models.derived_class import derived_class, once_per_class


@torch.library.custom_op(
    "internseg_ds::kept_images", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def kept_images(like: Tensor, keep: Tensor) -> Tensor:
    """Draw 1 with probability `keep`, else 0, in the shape, dtype and device of `like`: the numbers that
    `bernoulli_` draws. keep: fp64 without dimensions, on the CPU.

    The compiler joins operations with the same arguments into one. `like` is a tensor of each call's own, made
    by `torch.empty`, whose calls are never joined, so that two branches draw twice.
    """
    return torch.empty_like(like).bernoulli_(float(keep))


@kept_images.register_fake
def _(like: Tensor, keep: Tensor) -> Tensor:
    return torch.empty_like(like)


def draw_outside_of_graphs(block: nn.Module) -> None:
    """Change the drop-path modules in `block`, ours and those of libraries, so that they can be compiled for all
    probabilities at once. What is drawn, and how a branch is scaled, stay as they are in ours and in timm's."""
    module: Any
    for module in block.modules():
        rate = getattr(module, "drop_prob", None)
        is_drop_path = type(module).__name__.endswith("DropPath") and getattr(module, "scale_by_keep", True)
        if is_drop_path and isinstance(rate, float):
            module.__class__ = _drawing_class(type(module))
            module.keep = torch.tensor(1 - rate, dtype=torch.float64, device="cpu")


@once_per_class
def _drawing_class(owner: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not (self.training and torch.compiler.is_compiling()):
            return owner.forward(self, x)
        images = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=torch.float32, device=x.device)
        return x * (kept_images(images, self.keep) / self.keep.float()).to(x.dtype)

    return derived_class(owner, {"forward": forward})
