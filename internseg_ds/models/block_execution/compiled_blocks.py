"""The repeated blocks of a backbone, compiled by torch.compile: once for all blocks of a kind, forward and
backward.

In: a built model. Its blocks get subclasses of their classes whose `forward` is compiled; names, parameters,
hooks and checkpoints stay as they are. Hooks on a block (DeepSpeed's, which gather its weights) run outside of
what is compiled; hooks on modules inside it would be compiled too, so there must be none. Where a block cannot
be compiled, all of them go on uncompiled, and the log says so in one line.

Blocks of one kind stand in one list of modules and consist of the same classes. Each kind is a function of its
own for the compiler, which would otherwise take the widths of different stages for sizes that change, and
would count the graphs of all kinds against one limit.
"""

import logging
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from internseg_ds.models.activation_checkpointing import KEPT, run_keeping_matmuls
from internseg_ds.models.block_execution.drop_path_draws import draw_outside_of_graphs
from internseg_ds.models.derived_class import derived_class
from internseg_ds.torch_internals import compilation_error, operator_schema

log = logging.getLogger(__name__)

Forward = Callable[..., Any]
"""(block, *arguments) -> the block's result."""


def compile_blocks(backbone: nn.Module, names: Sequence[str], backend: str = "inductor") -> None:
    """Make the blocks of `backbone` with these names run compiled. Once for each model. Nothing is compiled
    before a block's first forward pass.

    names: as of `block_names`, which can be read from another copy of the model where this one's parameters are
    partitioned. backend: torch.compile's.
    """
    state = _Compilation(backend)
    kinds: dict[tuple[Any, ...], type[nn.Module]] = {}
    for name in names:
        block = backbone.get_submodule(name)
        draw_outside_of_graphs(block)
        kind = (name.rpartition(".")[0], *map(type, block.modules()))
        if kind not in kinds:
            kinds[kind] = _compiling_class(type(block), state, number=len(kinds))
        block.__class__ = kinds[kind]


class _Compilation:
    """How the blocks of one model are compiled, and whether they still are."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.failed = False

    def compiled(self, function: Forward, name: str, *, any_size: bool | None = None) -> Forward:
        """`function`, compiled under `name`. any_size: at once for all sizes; by default for those that come,
        and for any once others come."""

        def run(block: nn.Module, *args: Any, **keywords: Any) -> Any:
            return function(block, *args, **keywords)

        # the compiler keeps its graphs, and what it has learnt of sizes, with the code object
        code = run.__code__.replace(co_name=name)
        own = FunctionType(code, run.__globals__, name, None, run.__closure__)
        # with the numbers that the uncompiled block draws
        options: dict[str, Any] | None = {"fallback_random": True} if self.backend == "inductor" else None
        # a graph break is an error, so that it is seen
        return torch.compile(own, fullgraph=True, dynamic=any_size, backend=self.backend, options=options)

    def give_up(self, block: nn.Module, error: Exception) -> None:
        """From now on all blocks run uncompiled."""
        self.failed = True
        log.warning(
            "engine.compile: %s cannot be compiled, so the blocks run uncompiled (%s: %s)",
            type(block).__name__,
            type(error).__name__,
            " ".join(str(error).split())[:300],
        )


def _compiling_class(owner: type[nn.Module], state: _Compilation, number: int) -> type[nn.Module]:
    """A subclass of `owner` with a compiled forward. number: of the kind, from 0."""
    name = f"{owner.__name__}_{number}"
    training = state.compiled(owner.forward, name)
    keeping_matmuls = state.compiled(_keeping_matmuls(owner.forward), f"{name}_keeping_matmuls")
    # windows of an evaluation have many sizes
    evaluation = state.compiled(owner.forward, f"{name}_evaluation", any_size=True)

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        keeps = self.keeps_matmuls and torch.is_grad_enabled()
        if not state.failed:
            usual = training if torch.is_grad_enabled() else evaluation
            run = keeping_matmuls if keeps else usual
            try:
                return run(self, *args, **keywords)
            except compilation_error() as error:
                state.give_up(self, error)
        if keeps:
            return run_keeping_matmuls(self, owner.forward, self, *args, **keywords)
        return owner.forward(self, *args, **keywords)

    return derived_class(owner, {"forward": forward, "keeps_matmuls": False})


def _keeping_matmuls(forward: Forward) -> Forward:
    """The forward of a block that is compiled under the policy "all_but_matmuls"."""

    def run(block: nn.Module, *args: Any, **keywords: Any) -> Any:
        return checkpoint(forward, block, *args, use_reentrant=False, context_fn=_contexts, **keywords)

    return run


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_kept_or_not)


def _kept_or_not(_: Any, operator: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    """What the compiler keeps: the results of `KEPT`, and random numbers."""
    if operator_schema(operator).name in KEPT or torch.Tag.nondeterministic_seeded in operator.tags:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
