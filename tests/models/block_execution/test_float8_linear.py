"""Products in float8 against the same products in fp64 of operands that were quantised independently."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from internseg_ds.models.block_execution.compiled_blocks import compile_blocks
from internseg_ds.models.block_execution.float8_linear import multiply_in_float8, rows_in_float8
from internseg_ds.models.intern_image.dcnv3 import Fp32Linear
from tests.models.block_execution.test_compiled_blocks import GRAPHS

TOKENS, IN, OUT = 37, 64, 48


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.exact = Fp32Linear(IN, OUT)
        self.odd = nn.Linear(IN, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def quantised(matrix: Tensor) -> Tensor:
    """fp64 (r, c): e4m3 has 3 bits of mantissa, normal numbers down to 2^-6, and 448 as its largest; each row is
    scaled to that."""
    values = matrix.double()
    scale = values.abs().amax(dim=1, keepdim=True) / 448
    scaled = values / scale
    exponent = scaled.abs().clamp(min=2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (scaled / step).round() * step * scale  # rounds halves to even


def test_rows_become_e4m3_with_a_scale_each():
    matrix = torch.randn(TOKENS, IN) * torch.logspace(-6, 3, TOKENS).unsqueeze(1)
    values, scale = rows_in_float8(matrix)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (TOKENS, 1)
    # the scale is rounded to fp32, which moves the odd value over the middle between two numbers
    far = (values.double() * scale.double() - quantised(matrix)).abs() > 1e-5 * quantised(matrix).abs()
    assert far.double().mean() < 2e-3
    assert torch.equal(rows_in_float8(torch.zeros(2, 16))[0].float(), torch.zeros(2, 16))


def test_a_layer_and_its_gradients_are_products_of_quantised_operands():
    torch.manual_seed(0)
    layer = Block().bfloat16().layer
    block = nn.ModuleDict({"0": layer})
    assert multiply_in_float8(block, ["0"]) == 1
    x = torch.randn(1, TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(1, TOKENS, OUT, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(grad)
    weight = layer.weight
    expected = quantised(x[0]) @ quantised(weight).T + layer.bias.double()
    of_x = quantised(grad[0]) @ quantised(weight.T).T
    for found, reference in (
        (y[0], expected),
        (x.grad[0], of_x),
        (weight.grad, grad[0].double().T @ x[0].double()),
        (layer.bias.grad, grad[0].double().sum(dim=0)),
    ):
        assert found.dtype == torch.bfloat16
        error = (found.double() - reference).norm() / reference.norm()
        assert error < 5e-3  # of bf16 results
    exact = x[0].double() @ weight.double().T + layer.bias.double()
    assert 0.01 < (y[0].double() - exact).norm() / exact.norm() < 0.05  # of float8 operands


def test_names_and_weights_stay_and_layers_that_cannot_be_in_float8_too():
    blocks = nn.Sequential(Block().bfloat16(), Block().bfloat16())
    state = {name: value.clone() for name, value in blocks.state_dict().items()}
    assert multiply_in_float8(blocks, ["0", "1"]) == 2
    assert list(blocks.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in blocks.state_dict().items())
    assert type(blocks[0].layer).__name__ == "Float8Linear"
    assert type(blocks[0].exact) is Fp32Linear and type(blocks[0].odd) is nn.Linear


def test_rows_that_are_not_finite_make_results_that_are_not():
    layer = nn.Linear(16, 16, bias=False).bfloat16()
    multiply_in_float8(nn.ModuleDict({"0": layer}), ["0"])
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    x[1, 3] = float("inf")
    y = layer(x)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_only_the_parameter_itself_is_kept_of_a_weight_which_zero3_can_take_away():
    layer = nn.Linear(IN, OUT).bfloat16()
    multiply_in_float8(nn.ModuleDict({"0": layer}), ["0"])
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(TOKENS, IN, dtype=torch.bfloat16, requires_grad=True))
    storage = layer.weight.untyped_storage().data_ptr()
    assert [tensor is layer.weight for tensor in kept if tensor.untyped_storage().data_ptr() == storage] == [
        True
    ]


def test_compiled_blocks_multiply_in_float8_too():
    torch.manual_seed(0)
    blocks = nn.Sequential(Block().bfloat16(), Block().bfloat16())
    multiply_in_float8(blocks, ["0", "1"])
    compiled = copy.deepcopy(blocks)
    compile_blocks(compiled, ["0", "1"], GRAPHS)
    graphs = counters["stats"]["unique_graphs"]
    x = torch.randn(2, TOKENS, IN, dtype=torch.bfloat16)
    for block, other in zip(blocks, compiled):
        for module in (block, other):
            module(x).sum().backward()
        torch.testing.assert_close(other.layer.weight.grad, block.layer.weight.grad)
        torch.testing.assert_close(other(x), block(x))
    assert counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_products_are_those_of_the_cpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU multiplies no float8")
    layer = nn.Linear(IN, OUT).bfloat16()
    multiply_in_float8(nn.ModuleDict({"0": layer}), ["0"])
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
