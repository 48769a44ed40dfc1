"""The block that a backbone repeats: the unit in which ZeRO-3 gathers weights and reduces gradients. Built models and meta ones alike."""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from torch import Tensor, nn

LAYERS = (ConvModule, DepthwiseSeparableConvModule)
"""Of mmcv."""


@dataclass(frozen=True)
class RepeatedBlock:
    """class_name: module and qualified name, as in "package.module.Block". sizes: elements of each parameter of one block."""

    class_name: str
    sizes: tuple[int, ...]


def repeated_block(backbone: nn.Module) -> RepeatedBlock | None:
    """The largest module that stands more than once, with as many parameters, in a ModuleList or Sequential of `backbone`; None where there is none.

    InternViT-6B: its 48 blocks of 122.9 M elements.
    """
    largest: RepeatedBlock | None = None
    for parent in backbone.modules():
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
            continue
        seen: set[RepeatedBlock] = set()
        for child in parent:
            kind = type(child)
            if child is None or kind.__module__.startswith("torch.nn.") or issubclass(kind, LAYERS):
                continue  # a place left empty; a container or a plain layer, whose class heads have too
            block = RepeatedBlock(_class_name(child), tuple(param.numel() for param in child.parameters()))
            if block in seen and sum(block.sizes) > (sum(largest.sizes) if largest else 0):
                largest = block
            seen.add(block)
    return largest


@contextmanager
def odd_blocks(model: nn.Module, class_names: Collection[str]) -> Iterator[set[str]]:
    """Inside, during a forward pass: the set gets the names of those classes a module of which is called without a tensor by position, puts none out
    (but a list of them, say), or is called twice: hooks that see tensors come and go do not work on those."""
    odd: set[str] = set()
    calls: Counter[nn.Module] = Counter()

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        results = output if isinstance(output, tuple) else (output,)
        if calls[module] > 1 or not _hold_tensor(args) or not _hold_tensor(results):
            odd.add(_class_name(module))

    hooks = [
        module.register_forward_hook(look) for module in model.modules() if _class_name(module) in class_names
    ]
    try:
        yield odd
    finally:
        for hook in hooks:
            hook.remove()


def _hold_tensor(values: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
