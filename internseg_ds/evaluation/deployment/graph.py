"""What an exported file computes, and how it is captured from a segmentor by `torch.export`.

In: a segmentor, on the meta device to learn whether it can be captured, or with its weights. Out: a program of
torch's own operations, in fp32, from pixels to logits. Letters: b images, k classes, (h, w) their size.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from internseg_ds.distributed.construction import fill
from internseg_ds.models.backbone import patch_size
from internseg_ds.models.exporting.operators import portable_operators
from internseg_ds.torch_internals import fake_tensor_mode

Dynamic = Literal["none", "batch", "size"]
"""What of an input may differ from call to call: nothing; the number of images; their number and size."""
LEAST = 64
"""Pixels of the shortest side, where sides may differ: maps at 1/32 have two pixels then."""
SEEN = 3
"""Images, and further patches per side, of the example that a program with open sizes is captured from: numbers
that stand for no other size by chance."""


@dataclass(frozen=True)
class Input:
    """The images that a file takes."""

    size: tuple[int, int]
    """(h, w) of a file for one size; otherwise of the example that it is captured from."""
    dynamic: Dynamic
    multiple: int
    """Pixels that sides are multiples of where they may differ."""

    @property
    def least(self) -> int:
        """Shortest side of images whose size may differ, in steps of `multiple`."""
        return max(2, -(-LEAST // self.multiple))

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the example."""
        if self.dynamic != "size":
            return self.size
        height, width = (max(self.least, -(-side // self.multiple)) * self.multiple for side in self.size)
        return height, width + SEEN * self.multiple  # not square: one number for two sizes would tie them


class SegmentorGraph(nn.Module):
    """images (b, c, h, w) float32, RGB from 0 to 255 -> logits (b, k, h, w) float32.

    mean, std: of the channels, in the order in which the segmentor takes them. bgr: that this is BGR. Images whose
    sides are not whole patches are padded with zeros behind the normalisation, as in the evaluation. The segmentor
    loses its auxiliary heads, which only training uses.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, segmentor: nn.Module, mean: list[float], std: list[float], *, bgr: bool) -> None:
        super().__init__()
        if hasattr(segmentor, "auxiliary_head"):
            del segmentor.auxiliary_head
        self.segmentor = segmentor
        self.bgr = bgr
        self.patch = patch_size(segmentor.get_submodule("backbone"))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        pixels = ((image.flip(1) if self.bgr else image) - self.mean) / self.std
        height, width = image.shape[2:]
        if not isinstance(height, torch.SymInt) and (height % self.patch or width % self.patch):
            pixels = F.pad(pixels, (0, -width % self.patch, 0, -height % self.patch))
        segmentor: Any = self.segmentor
        return segmentor.encode_decode(pixels, [{}])[:, :, :height, :width]


def without_values(segmentor: nn.Module) -> AbstractContextManager[Any]:
    """Gives a segmentor on the meta device parameters and buffers that say that they are on the CPU, and have no
    values all the same: constants of the program, which are made while it is captured, keep theirs. Returns the mode
    in which it is captured and translated."""
    mode = fake_tensor_mode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        fill(
            segmentor,
            lambda _, shape: torch.empty(shape),
            lambda _, on_meta: torch.empty_like(on_meta, device="cpu"),
        )
    return mode


def values_of(graph: nn.Module) -> Mapping[str, Tensor]:
    """All tensors of a graph, by the names that its program has for them."""
    return dict(graph.named_parameters()) | dict(graph.named_buffers())


def captured(graph: nn.Module, given: Input) -> ExportedProgram:
    """The program of a graph, of operations that other formats have.

    Raises whatever torch raises for a model that it cannot capture, and ValueError where the model turns sizes that
    are to differ into constants.
    """
    mean = graph.get_buffer("mean")
    images = 1 if given.dynamic == "none" else SEEN
    example = torch.zeros(images, mean.size(1), *given.shape, device=mean.device)
    axes: dict[int, Any] = {}
    if given.dynamic != "none":
        axes[0] = Dim("batch", min=1)
    if given.dynamic == "size":
        steps = {axis: Dim(name, min=given.least) for axis, name in ((2, "rows"), (3, "columns"))}
        axes |= {axis: step if given.multiple == 1 else given.multiple * step for axis, step in steps.items()}
    with torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes=(axes or None,), strict=False)
    names = {*program.graph_signature.user_inputs, *program.graph_signature.user_outputs}
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in names]
    if fixed := sorted({known for shape in shapes for axis in axes if (known := _constant(shape[axis]))}):
        raise ValueError(f"its forward pass makes constants of the sizes {fixed} of the example")
    return program.run_decompositions(portable_operators())


def _constant(side: int | torch.SymInt) -> int | None:
    """The value of a side that was to stay open, where the capture has found that it can have that alone."""
    return side.node.maybe_as_int() if isinstance(side, torch.SymInt) else side
