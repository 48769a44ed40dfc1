"""The block that a backbone repeats: the unit in which ZeRO-3 gathers weights and reduces gradients. Built models and meta ones alike."""

from dataclasses import dataclass

from torch import nn


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
            if child is None or kind.__module__.startswith("torch.nn."):  # a place left empty; a container or a plain layer, whose class heads have too
                continue
            block = RepeatedBlock(f"{kind.__module__}.{kind.__qualname__}", tuple(param.numel() for param in child.parameters()))
            if block in seen and sum(block.sizes) > (sum(largest.sizes) if largest else 0):
                largest = block
            seen.add(block)
    return largest
