"""Blocks that ZeRO-3 gathers as one (DeepSpeed's leaf modules): gradients of their inputs, which DeepSpeed's
hooks need, and the compiler, which DeepSpeed's hooks must stay out of.

DeepSpeed reduces a block's gradients, and releases its weights, once the gradient of the block's input is
computed. After frozen layers, or where a block takes the image itself, no gradient of the input is computed:
the hook would run before the gradients of the weights exist, and reduce zeros.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from internseg_ds.errors import ConfigError
from internseg_ds.models.block_execution.compiled_blocks import compile_blocks

log = logging.getLogger(__name__)


def require_input_gradients(model: nn.Module) -> None:
    """Makes each leaf module of `model` that trains compute the gradient of its input. After
    deepspeed.initialize."""
    for name, block in model.named_modules():
        if z3_leaf_module(block) and any(param.requires_grad for param in block.parameters()):
            # before DeepSpeed's own hooks, which look at the arguments that this one returns
            block.register_forward_pre_hook(
                lambda _, args, name=name: _with_gradient(args, name), prepend=True
            )


def _with_gradient(args: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """The arguments of the block `name`, with at least one tensor that requires a gradient, unless no
    gradients are computed at all."""
    tensors = [index for index, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not torch.is_grad_enabled() or any(args[index].requires_grad for index in tensors):
        return args
    if not tensors:
        raise ConfigError(
            f"zero_optimization.leaf_module of the ds_config names the class of {name}, which takes no "
            "tensor by position, so that DeepSpeed cannot tell when its gradients are there; leave that "
            "class out"
        )
    first = tensors[0]
    return *args[:first], args[first].detach().requires_grad_(), *args[first + 1 :]


def compile_under_hooks(backbone: nn.Module, names: Sequence[str], *, partitioned: bool) -> None:
    """Makes the repeated blocks of `backbone` run compiled, as `compile_blocks`, or logs in one line why not.
    After deepspeed.initialize. names: of the blocks. partitioned: under ZeRO-3."""
    if partitioned and not all(z3_leaf_module(backbone.get_submodule(name)) for name in names):
        log.warning(
            "engine.compile: the blocks run uncompiled, because DeepSpeed's hooks are on the layers inside "
            'them; write "leaf_module": "auto" in zero_optimization of the ds_config'
        )
        return
    if names:
        log.info("the first step and the first evaluation compile the backbone's blocks (engine.compile)")
    else:
        log.warning("engine.compile: %s repeats no block to compile", type(backbone).__name__)
    compile_blocks(backbone, names)
