"""Activation checkpointing: which activations of a backbone's blocks are kept for the backward pass, and which are computed again in it.

For any backbone with `with_cp` (mmseg's name of the switch) and a `recomputation` that it hands to `run_block`. No policy changes a loss or a gradient,
not in the last bit; random numbers of a block (drop-path) are drawn alike both times.
Sources: Chen et al., "Training deep nets with sublinear memory cost" (2016); Korthikanti et al., "Reducing activation recomputation" (2022), section 5,
for recomputing what is cheap and large.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

Recomputation = Literal["none", "blocks", "all_but_matmuls"] | int
"""none: everything is kept. blocks: a block keeps its input, and runs again. k: so does every k-th block, the others keep everything. all_but_matmuls: a
block keeps its input and the results of matrix products, convolutions, DCNv3 and attention; what lies between them (norms, activations, scales) runs again."""
NAMES = ("none", "blocks", "all_but_matmuls")


def check_recomputation(value: Any) -> None:
    """Raises ValueError unless `value` is a `Recomputation`."""
    if isinstance(value, bool) or not (
        value in NAMES if isinstance(value, str) else isinstance(value, int) and value >= 1
    ):
        raise ValueError(
            f"it is neither {', '.join(map(repr, NAMES))} nor a whole number k of at least 1, for every k-th block"
        )


def recomputing_backbones(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that can recompute their blocks by a policy of `Recomputation`."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "with_cp") and hasattr(module, "recomputation")
    ]


def set_recomputation(model: nn.Module, recomputation: Recomputation) -> None:
    """Gives every backbone in `model` that can recompute its blocks this policy in place of its config's `with_cp`; built models and meta ones alike.

    Raises ValueError for what is no policy, or when the model holds no such backbone.
    """
    check_recomputation(recomputation)
    backbones = recomputing_backbones(model)
    if not backbones:
        raise ValueError("the backbone has no activation checkpointing")
    for backbone in backbones:
        backbone.with_cp = recomputation != "none"
        if backbone.with_cp:
            backbone.recomputation = recomputation


def run_block(block: nn.Module, *inputs: Tensor, index: int, recomputation: Recomputation) -> Any:
    """block(*inputs), keeping for the backward pass what `recomputation` says. index: of the block, from 0; every k-th block: 0, k, 2 k, ...

    Nothing is recomputed where no gradients are recorded.
    """
    if (
        recomputation == "none"
        or not torch.is_grad_enabled()
        or (isinstance(recomputation, int) and index % recomputation)
    ):
        return block(*inputs)
    if recomputation == "all_but_matmuls":
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=_keeping_matmuls)
    return checkpoint(block, *inputs, use_reentrant=False)


KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::convolution",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn_3::fwd",
        "flash_attn_3::_flash_attn_forward",
        "internseg_ds::dcnv3",
    }
)
"""Operations whose results `all_but_matmuls` keeps: their FLOPs per byte of result are hundreds, those of all others a few. Deformable sampling lies between
them (36 in bf16 with 3 x 3 points), at addresses that no cache foresees. A backbone with an operation of its own adds it."""


def _keeping_matmuls() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: list[Any] = []
    return _Keep(kept), _Return(kept)


# torch.utils.checkpoint.create_selective_checkpoint_contexts does the same for operations that are the same both times. Under ZeRO-3 they are not: modules'
# hooks gather weights in one pass and find them there in the other, and DeepSpeed's linear layer adds its bias in place to a product that was kept.


class _Keep(TorchDispatchMode):
    """Appends what the operations of `KEPT` return to a list. Raises RuntimeError when one is changed in place after it was read: its first value is gone."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept
        self.storages, self.read = set(), set()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        written = _storages(_written(func, args))
        if written & self.read:
            raise RuntimeError(
                f"engine.recomputation='all_but_matmuls' cannot be with this backbone: {func} changes the result of a matrix product "
                "that was read before; use 'blocks'"
            )
        out = func(*args, **(kwargs or {}))
        self.read |= _storages(tree_leaves((args, kwargs))) & self.storages - _storages(
            tree_leaves(out)
        )  # a view, or a change in place, is no reading
        if func._schema.name in KEPT:
            self.kept.append(_detached(out))
            self.storages |= _storages(tree_leaves(out))
        return out


class _Return(TorchDispatchMode):
    """Gives that list out again, in order, instead of running these operations. What changed a kept tensor in place has changed it already."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> "_Return":
        self.next, self.storages = iter(self.kept), set()
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func._schema.name in KEPT:
            out = _detached(next(self.next))
            self.storages |= _storages(tree_leaves(out))
            return out
        if (written := _written(func, args)) and _storages(written) <= self.storages:
            return written[0]
        return func(*args, **(kwargs or {}))


def _detached(out: Any) -> Any:
    """The same values without their graphs, which would hold each other for ever."""
    if isinstance(out, Tensor):
        return out.detach()
    return type(out)(map(_detached, out)) if isinstance(out, (tuple, list)) else out


def _written(func: Callable, args: tuple) -> list[Tensor]:
    """The tensors among its positional arguments that an operation changes in place."""
    return [
        arg
        for arg, argument in zip(args, func._schema.arguments)
        if isinstance(arg, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
    ]


def _storages(values: list[Any]) -> set[int]:
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}
