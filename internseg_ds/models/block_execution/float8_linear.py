"""Linear layers whose products are of float8 matrices, scaled anew in every pass.

In and out: bf16, as before; weights stay as they are, under their names. The result and the gradient of the
input are products of e4m3 matrices, each row of the one and each column of the other with a scale of its own,
448 over its largest value; sums are fp32. The gradient of the weight, a sum over all tokens, is a bf16 product.
Source: Micikevicius et al., "FP8 formats for deep learning" (2022), for e4m3.

Why not torchao's layer, whose recipe "rowwise_with_gw_hp" does much the same: it keeps a view of the weight for
the backward pass, and with it, under ZeRO-3, every block's gathered weights. Here the parameter itself is kept,
which is empty until it is gathered again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from internseg_ds.models.derived_class import derived_class, once_per_class
from internseg_ds.torch_internals import scaled_product

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
MULTIPLE = 16
"""Of rows and columns of a weight, which the products on GPUs want."""


def multiply_in_float8(backbone: nn.Module, names: Sequence[str]) -> int:
    """Make the linear layers in the blocks of `backbone` with these names multiply in float8; return how many.

    Left as they are: layers with a forward of their own (those that compute in fp32 whatever the model does),
    low-rank adapters, and sizes that are no multiples of 16.
    """
    layers = [layer for name in names for layer in float8_layers(backbone.get_submodule(name))]
    for layer in layers:
        layer.__class__ = _float8_class(type(layer))
    return len(layers)


def float8_layers(block: nn.Module) -> list[nn.Module]:
    """The layers of a block that `multiply_in_float8` changes."""
    return [
        layer
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and not any(part in ("lora_A", "lora_B") for part in name.split("."))
        and not layer.in_features % MULTIPLE
        and not layer.out_features % MULTIPLE
    ]


@once_per_class
def _float8_class(owner: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = Float8Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias

    return derived_class(owner, {"forward": forward}, word="Float8")


class Float8Product(torch.autograd.Function):
    """x (m, k) times the transpose of weight (n, k) -> (m, n), all bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """grad: (m, n) -> the gradients of x and weight, None for one that is not wanted."""
        x, weight = ctx.saved_tensors
        of_x = _product(grad, weight.mT) if ctx.needs_input_grad[0] else None
        of_weight = grad.mT @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times the transpose of b (n, k) -> (m, n) in the dtype of a."""
    (a8, a_scale), (b8, b_scale) = rows_in_float8(a), rows_in_float8(b)
    return scaled_product(a8, b8.mT, a_scale, b_scale.mT, a.dtype)


def rows_in_float8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix: (r, c), any float dtype. Returns (r, c) in e4m3, contiguous, and the scale of each row, (r, 1)
    float32: their product is the matrix within 2^-4 of each value, and 2^-10 of a row's scale."""
    # one pass over the values, and no copy of them
    largest = torch.linalg.vector_norm(matrix, ord=float("inf"), dim=-1, keepdim=True)
    scale = largest.float().clamp(min=1e-12) / LARGEST
    return (matrix / scale).to(E4M3).contiguous(), scale
