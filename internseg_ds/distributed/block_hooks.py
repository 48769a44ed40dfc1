"""Blocks that ZeRO-3 handles as one (DeepSpeed's leaf modules): what their hooks need of the model, where the model does not bring it.

DeepSpeed reduces a block's gradients, and lets go of its weights, when the gradient of the block's input is there. After frozen layers, or where
a block takes the image itself, no gradient of the input is computed: the hook would come before the gradients of the weights, and reduce zeros.
"""

from typing import Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from internseg_ds.errors import ConfigError


def require_input_gradients(model: nn.Module) -> None:
    """Has each block of `model` that DeepSpeed handles as one, and that trains, compute the gradient of its input. After deepspeed.initialize."""
    for name, block in model.named_modules():
        if z3_leaf_module(block) and any(param.requires_grad for param in block.parameters()):
            # first, for DeepSpeed's hooks look at what it returns
            block.register_forward_pre_hook(lambda _, args, name=name: _requiring(args, name), prepend=True)


def _requiring(args: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """The block's arguments, one tensor of which requires a gradient where any is computed."""
    tensors = [place for place, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not torch.is_grad_enabled() or any(args[place].requires_grad for place in tensors):
        return args
    if not tensors:
        raise ConfigError(
            f"zero_optimization.leaf_module of the ds_config names the class of {name}, which takes no tensor by position, "
            "so that DeepSpeed cannot tell when its gradients are there; leave that class out"
        )
    first = tensors[0]
    return *args[:first], args[first].detach().requires_grad_(), *args[first + 1 :]
