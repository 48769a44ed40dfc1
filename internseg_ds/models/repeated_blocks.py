"""The block that a backbone repeats: the unit in which ZeRO-3 gathers weights and reduces gradients.

Reads modules and parameter shapes only, so it works on models on the meta device, and on those that ZeRO-3 has
partitioned.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from torch import Tensor, nn

from internseg_ds.zero_partition import full_shape

PLAIN_LAYERS = (ConvModule, DepthwiseSeparableConvModule)
"""mmcv's convolution layers. They are no blocks of a backbone: heads consist of the same classes, and a
class that is gathered as one unit is gathered so wherever it occurs."""


@dataclass(frozen=True)
class RepeatedBlock:
    """A block class of a backbone, with the parameter sizes of one block."""

    class_name: str
    """Module and qualified name of the class, as in "package.module.Block"."""
    sizes: tuple[int, ...]
    """Number of elements of each parameter of one block."""


def repeated_block(backbone: nn.Module) -> RepeatedBlock | None:
    """Return the largest block that occurs more than once, with the same parameter sizes, in one ModuleList
    or Sequential of `backbone`; None where there is none.

    InternViT-6B: its 48 blocks of 122.9 M elements.
    """
    largest: RepeatedBlock | None = None
    for parent in backbone.modules():
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
            continue
        seen: set[RepeatedBlock] = set()
        for child in parent:
            kind = type(child)
            # None: mmseg leaves entries of some Sequentials empty. torch.nn's containers and layers, as those
            # of mmcv, are classes that heads have too.
            if child is None or kind.__module__.startswith("torch.nn.") or issubclass(kind, PLAIN_LAYERS):
                continue
            sizes = tuple(full_shape(param).numel() for param in child.parameters())
            block = RepeatedBlock(_class_name(child), sizes)
            if block in seen and sum(block.sizes) > (sum(largest.sizes) if largest else 0):
                largest = block
            seen.add(block)
    return largest


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The modules of `backbone` of the class that `repeated_block` finds, in their order; those of all stages,
    whatever their sizes."""
    block = repeated_block(backbone)
    return [module for module in backbone.modules() if block and _class_name(module) == block.class_name]


def block_names(backbone: nn.Module) -> list[str]:
    """The names in `backbone` of its `repeated_blocks`."""
    blocks = set(repeated_blocks(backbone))
    return [name for name, module in backbone.named_modules() if module in blocks]


@contextmanager
def unhookable_blocks(model: nn.Module, class_names: Collection[str]) -> Iterator[set[str]]:
    """Collect, during a forward pass inside the `with` block, the names of those classes on which hooks that
    see a module's input and output tensors do not work.

    These are classes a module of which is called without a floating-point tensor among its positional
    arguments, returns none (a list of tensors, say), or is called more than once.
    """
    found: set[str] = set()
    calls: Counter[nn.Module] = Counter()

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        results = output if isinstance(output, tuple) else (output,)
        if calls[module] > 1 or not _hold_tensor(args) or not _hold_tensor(results):
            found.add(_class_name(module))

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if _class_name(module) in class_names
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _hold_tensor(values: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
