"""Activation checkpointing: which activations of a backbone's blocks are kept for the backward pass, and
which are computed again in it.

For any backbone with `with_cp` (mmseg's name of the switch) and a `recomputation` that it passes to
`run_block`. No policy changes a loss, a gradient or a running statistic, not in the last bit: a block draws
the same random numbers (drop-path) both times, and batch norms count a batch once. Sources: Chen et al.,
"Training deep nets with sublinear memory cost" (2016); Korthikanti et al., "Reducing activation
recomputation" (2022), section 5, for recomputing what is cheap and large.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internseg_ds.models.derived_class import derived_class, once_per_class
from internseg_ds.torch_internals import (
    BATCH_NORM,
    TorchDispatchMode,
    operator_schema,
    storage_id,
    tree_leaves,
)

CheckpointingPolicy = Literal["none", "blocks", "all_but_matmuls"] | int
"""What a backbone's blocks keep for the backward pass.

none: everything. blocks: its input only; the block runs again in the backward pass. An integer k: every k-th
block as under "blocks", the others everything. all_but_matmuls: its input and the results of matrix products,
convolutions, DCNv3 and attention; what lies between them (norms, activations, scales) runs again."""
NAMES = ("none", "blocks", "all_but_matmuls")


class PolicyNotPossible(RuntimeError):
    """A backbone computes in a way that a policy would make wrong."""


@runtime_checkable
class CheckpointingBackbone(Protocol):
    """A backbone that runs its blocks through `run_block`."""

    with_cp: bool
    recomputation: CheckpointingPolicy


def check_recomputation(value: Any) -> None:
    """Raise ValueError unless `value` is a `CheckpointingPolicy`."""
    if isinstance(value, str):
        valid = value in NAMES
    else:
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not valid:
        raise ValueError(
            f"it is neither {', '.join(map(repr, NAMES))} nor a whole number k of at least 1, for every "
            "k-th block"
        )


def checkpointing_backbones(model: nn.Module) -> list[CheckpointingBackbone]:
    """The modules of `model` that can run their blocks under any `CheckpointingPolicy`."""
    return [module for module in model.modules() if isinstance(module, CheckpointingBackbone)]


def set_recomputation(model: nn.Module, recomputation: CheckpointingPolicy) -> None:
    """Set the policy of every backbone in `model` that has one, in place of its config's `with_cp`. Works on
    models on the meta device too.

    Raises ValueError for what is no policy, or when the model holds no such backbone.
    """
    check_recomputation(recomputation)
    backbones = checkpointing_backbones(model)
    if not backbones:
        raise ValueError("the backbone has no activation checkpointing")
    for backbone in backbones:
        backbone.with_cp = recomputation != "none"
        if backbone.with_cp:
            backbone.recomputation = recomputation


def runs_compiled(block: Any) -> bool:
    """Whether a block is one that `block_execution.compiled_blocks` compiles: nobody sees the operations inside
    it, and modules inside it can have no hooks."""
    return hasattr(block, "keeps_matmuls")


def run_block(
    block: Any, *inputs: Any, index: int, recomputation: CheckpointingPolicy, **keywords: Any
) -> Any:
    """Return block(*inputs, **keywords), keeping for the backward pass what `recomputation` says.

    block: a module or a function. inputs: its positional arguments, tensors of any shapes and dtypes among
    them. index: of the block in the backbone, from 0; every k-th block is 0, k, 2 k, ... Nothing is recomputed
    where no gradients are recorded, and a module that no gradient goes through (a frozen block in front of all
    that trains) runs without autograd.

    Why whole blocks are wrapped, and from outside: the input of a block is its smallest activation that all
    others follow from, and the block is what ZeRO-3 gathers at once, so its weights are gathered one more
    time and not once for every layer in it. Called inside checkpoint(), the block's own hooks run in both
    passes, and they are what gathers. Why the non-reentrant variant: it needs no input that requires a
    gradient (an image, or the output of frozen blocks, does not), and works with hooks and keyword arguments.
    """
    # not block(...): that of `checkpoint_calls` would come back here
    run = functools.partial(nn.Module.__call__, block) if isinstance(block, nn.Module) else block
    in_graph = runs_compiled(block)
    if in_graph:
        block.keeps_matmuls = recomputation == "all_but_matmuls"
    if not torch.is_grad_enabled():
        return run(*inputs, **keywords)
    if isinstance(block, nn.Module) and not _passes_gradients(block, inputs, keywords):
        with torch.no_grad():
            return run(*inputs, **keywords)
    if recomputation == "none" or (isinstance(recomputation, int) and index % recomputation):
        return run(*inputs, **keywords)
    if recomputation == "all_but_matmuls":
        return run(*inputs, **keywords) if in_graph else run_keeping_matmuls(block, run, *inputs, **keywords)
    contexts = functools.partial(_second_pass_apart, _norms_with_moments(block))
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts, **keywords)


def _passes_gradients(block: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether a gradient goes to a parameter of the block, or through it to one of its inputs."""
    return any(param.requires_grad for param in block.parameters()) or any(
        isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((inputs, keywords))
    )


def run_keeping_matmuls(block: Any, function: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
    """Return function(*inputs, **keywords), which runs `block`, under the policy "all_but_matmuls"."""
    contexts = functools.partial(_keeping_matmuls, _norms_with_moments(block))
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts, **keywords)


def _norms_with_moments(block: Any) -> list[Any]:
    """The batch norms in a block that update running statistics as they run."""
    modules = block.modules() if isinstance(block, nn.Module) else ()
    return [
        module
        for module in modules
        if isinstance(module, BATCH_NORM) and module.training and module.track_running_stats
    ]


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Of the first and of the second pass of one block."""


def _second_pass_apart(norms: Sequence[Any]) -> Contexts:
    return nullcontext(), statistics_left_alone(norms)


@contextmanager
def statistics_left_alone(norms: Sequence[Any]) -> Iterator[None]:
    """Batch norms normalise as in training, and their running statistics, which the first pass has updated,
    stay as they are."""
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def checkpoint_calls(blocks: Sequence[nn.Module]) -> None:
    """Make every call of these blocks go through `run_block`, whoever calls them: for backbones whose forward
    pass is another library's.

    Each block gets a subclass of its class, its index, and an attribute `recomputation`, "none" to begin with,
    that its backbone sets before a forward pass.
    """
    block: Any
    for index, block in enumerate(blocks):
        block.__class__ = _checkpointing_class(type(block))
        block.block_index = index
        block.recomputation = "none"


@once_per_class
def _checkpointing_class(owner: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        return run_block(self, *args, index=self.block_index, recomputation=self.recomputation, **keywords)

    return derived_class(owner, {"__call__": call})


KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_mm",
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
"""Operations whose results `all_but_matmuls` keeps: they take hundreds of FLOPs per byte of result, all
others a few. Deformable sampling lies between (36 FLOPs per byte in bf16 with 3 x 3 points), and reads
addresses that no cache can prefetch. A backbone with an expensive operation of its own adds it here."""


# torch.utils.checkpoint.create_selective_checkpoint_contexts does the same where both passes run the same
# operations. Under ZeRO-3 they do not: hooks gather weights in one pass and find them gathered in the other,
# and DeepSpeed's linear layer adds its bias in place to a product that was kept.


def _keeping_matmuls(norms: Sequence[Any]) -> Contexts:
    kept: list[Any] = []
    return _KeepResults(kept), _returning_kept_results(kept, norms)


@contextmanager
def _returning_kept_results(kept: list[Any], norms: Sequence[Any]) -> Iterator[None]:
    with statistics_left_alone(norms), _ReturnKeptResults(kept):
        yield


class _KeepResults(TorchDispatchMode):
    """In the first pass: appends what the operations of `KEPT` return to `kept`.

    Raises PolicyNotPossible when such a result is changed in place after it was read. The second pass would give
    the changed values to the operation that read the first ones, so gradients would be wrong.
    """

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept
        self.kept_storages: set[int] = set()
        self.read_storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _storages(_written(func, args)) & self.read_storages:
            raise PolicyNotPossible(
                f"engine.recomputation='all_but_matmuls' cannot be with this backbone: {func} changes the "
                "result of a matrix product that was read before; use 'blocks'"
            )
        out = func(*args, **(kwargs or {}))
        # an operation that returns the same storage is a view or a change in place: neither is a reading
        read = _storages(tree_leaves((args, kwargs))) - _storages(tree_leaves(out))
        self.read_storages |= read & self.kept_storages
        if operator_schema(func).name in KEPT:
            self.kept.append(_detached(out))
            self.kept_storages |= _storages(tree_leaves(out))
        return out


class _ReturnKeptResults(TorchDispatchMode):
    """In the second pass: returns the results in `kept`, in their order, instead of running these operations.

    Operations that change a kept result in place are skipped, because they have changed it in the first pass.
    """

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept
        self.remaining: Iterator[Any] = iter(())
        self.kept_storages: set[int] = set()

    def __enter__(self) -> "_ReturnKeptResults":
        self.remaining = iter(self.kept)
        self.kept_storages = set()
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator_schema(func).name in KEPT:
            out = _detached(next(self.remaining))
            self.kept_storages |= _storages(tree_leaves(out))
            return out
        written = _written(func, args)
        if written and _storages(written) <= self.kept_storages:
            return written[0]
        return func(*args, **(kwargs or {}))


def _detached(out: Any) -> Any:
    """The same tensors without their autograd graph: graph and kept result would hold each other alive."""
    if isinstance(out, Tensor):
        return out.detach()
    return type(out)(map(_detached, out)) if isinstance(out, (tuple, list)) else out


def _written(func: Callable[..., Any], args: tuple) -> list[Tensor]:
    """The tensors among its positional arguments that an operation changes in place."""
    return [
        arg
        for arg, argument in zip(args, operator_schema(func).arguments)
        if isinstance(arg, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
    ]


def _storages(values: list[Any]) -> set[int]:
    """Identities of the storages of the tensors in `values`."""
    return {storage_id(value) for value in values if isinstance(value, Tensor)}
