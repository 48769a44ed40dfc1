import pytest
from torch import nn

from internseg_ds.planning.memory import training_state_bytes

N = 64


@pytest.mark.parametrize(("zero", "precision", "expected"), [  # bytes per parameter of weights, gradients, optimizer, by ZeRO's table 1
    ({"stage": 0}, "bf16", (2, 2, 12)),
    ({"stage": 1}, "bf16", (2, 2, 12 / N)),
    ({"stage": 2}, "bf16", (2, 2 / N, 12 / N)),
    ({"stage": 3}, "bf16", (2 / N, 2 / N, 12 / N)),
    ({"stage": 3}, "autocast", (4 / N, 4 / N, 12 / N)),
    ({"stage": 0}, "fp32", (4, 4, 8)),
])
def test_bytes_per_parameter_are_those_of_the_zero_paper(zero, precision, expected):
    model = nn.Linear(640, 640, bias=False, device="meta")
    rows = training_state_bytes(model, {"zero_optimization": zero}, precision, N)
    assert [size / 640**2 for _, size, _ in rows] == pytest.approx(expected)
    assert {place for *_, place in rows} == {"accelerator"}


def test_frozen_parameters_have_weights_only():
    model = nn.Linear(64, 64, bias=False, device="meta").requires_grad_(False)
    assert [size for _, size, _ in training_state_bytes(model, {}, "bf16", 1)] == [2 * 64 * 64, 0, 0]


def test_offloaded_state_lies_on_the_host():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    places = {part: place for part, _, place in training_state_bytes(nn.Linear(4, 4), {"zero_optimization": zero}, "bf16", 1)}
    assert places == {"weights": "accelerator", "gradients": "cpu", "optimizer": "cpu"}


def test_hpz_keeps_a_second_copy_of_the_weights_within_each_node():
    model = nn.Linear(640, 640, bias=False, device="meta")
    rows = training_state_bytes(model, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "bf16", N)
    assert rows[-1] == ("second copy", 2 * 640 * 640 // 8, "accelerator")
    assert rows[:-1] == training_state_bytes(model, {"zero_optimization": {"stage": 3}}, "bf16", N)
