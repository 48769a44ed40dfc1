import pytest
from torch import nn

from internseg_ds.planning.memory import Part, passing, state
from internseg_ds.planning.training_pass import Use

N = 64
GRADIENT_OFF = {"offload_optimizer": {"device": "cpu"}}


def of(parts: list[Part], name: str) -> Part:
    return next((part for part in parts if part.name == name), Part(name))


@pytest.mark.parametrize(
    ("zero", "precision", "expected"),
    [  # bytes per parameter of weights, gradients, optimizer, by ZeRO's table 1
        ({"stage": 0}, "bf16", (2, 2, 12)),
        ({"stage": 2}, "bf16", (2, 2 / N, 12 / N)),
        ({"stage": 3}, "bf16", (2 / N, 2 / N, 12 / N)),
        ({"stage": 3}, "autocast", (4 / N, 4 / N, 12 / N)),
        ({"stage": 0}, "fp32", (4, 4, 8)),
    ],
)
def test_bytes_per_parameter_are_those_of_the_zero_paper(zero, precision, expected):
    parts = state(nn.Linear(640, 640, bias=False, device="meta"), {"zero_optimization": zero}, precision, N)
    assert [part.device / 640**2 for part in parts] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("more", "accumulation", "expected"),
    [
        ({"stage": 1, "overlap_comm": True}, 1, 2 / N),  # each gradient is reduced as it is made
        (
            {"stage": 1, "overlap_comm": True},
            2,
            2 + 2 / N,
        ),  # the last micro-batch reduces what the others piled up
        ({"stage": 1}, 1, 2 + 2 / N),
        ({"stage": 2}, 2, 2 * 2 / N),
        ({"stage": 3}, 2, 2 / N),
    ],
)
def test_gradients_pile_up_as_deepspeed_reduces_them(more, accumulation, expected):
    parts = state(
        nn.Linear(640, 640, bias=False, device="meta"), {"zero_optimization": more}, "bf16", N, accumulation
    )
    assert sum(
        part.device for part in parts if "gradients" in part.name and "train" in part.phases
    ) / 640**2 == pytest.approx(expected)


def test_frozen_parameters_have_weights_only():
    model = nn.Linear(64, 64, bias=False, device="meta").requires_grad_(False)
    assert [part.device for part in state(model, {}, "bf16", 1)] == [2 * 64 * 64, 0, 0]


def test_offloaded_state_lies_on_the_host_with_its_gradients_in_both_dtypes():
    parts = state(nn.Linear(4, 4, bias=False), {"zero_optimization": {"stage": 3, **GRADIENT_OFF}}, "bf16", 1)
    assert {part.name: (part.device // 16, part.host // 16) for part in parts} == {
        "weights": (2, 0),
        "gradients": (0, 2),
        "optimizer": (0, 12),
        "gradients in fp32": (0, 4),
    }


def test_hpz_keeps_a_second_copy_of_the_weights_within_each_node():
    model = nn.Linear(640, 640, bias=False, device="meta")
    parts = state(model, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "bf16", N)
    assert parts[-1] == Part("second copy (hpZ)", 2 * 640 * 640 // 8)
    assert parts[:-1] == state(model, {"zero_optimization": {"stage": 3}}, "bf16", N)


def there_and_back(*names: str) -> list[Use]:
    return [Use(name, begins) for name in (*names, *reversed(names)) for begins in (True, False)]


def test_gathered_weights_are_what_the_order_of_modules_lets_pile_up():
    model = nn.Sequential(*(nn.Linear(10, 10, bias=False, device="meta") for _ in range(3)))
    alone = {
        "stage": 3,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }
    uses = there_and_back("0", "1", "2")

    def gathered(zero: dict, uses: list[Use] | None = uses, world_size: int = 2) -> int:
        return of(
            passing(model, {"zero_optimization": zero}, "bf16", world_size, uses, [300]), "gathered weights"
        ).device

    assert gathered(alone) == 2 * 100
    assert gathered({**alone, "stage3_max_reuse_distance": 1000}) == 2 * 300
    assert gathered({**alone, "stage3_prefetch_bucket_size": 200}) == 2 * (
        300 + 200
    )  # two that come together are copied out of one buffer
    assert gathered(alone, world_size=1) == 0  # one process computes with its partition
    assert gathered({**alone, "offload_param": {"device": "cpu"}}, world_size=1) == 2 * 100
    for zero in (alone, {**alone, "stage3_max_reuse_distance": 1000}):
        assert gathered(zero, uses=None) >= gathered(zero)


def test_buckets_are_doubled_where_communication_overlaps():
    model = nn.Linear(64, 64, bias=False, device="meta")
    for zero, expected in (
        ({"stage": 2}, 1),
        ({"stage": 2, "overlap_comm": True}, 2),
        ({"stage": 3, "overlap_comm": True}, 1),
    ):
        parts = passing(
            model, {"zero_optimization": {"reduce_bucket_size": 1000, **zero}}, "bf16", 2, None, [64 * 64]
        )
        assert of(parts, "communication buckets").device == expected * 2 * 1000
    assert (
        of(
            passing(model, {"zero_optimization": {"stage": 1}}, "bf16", 2, None, [64 * 64]),
            "communication buckets",
        ).device
        == 2 * 500_000_000
    )


def test_an_update_makes_the_gradients_of_one_group_fp32():
    model = nn.Linear(64, 64, bias=False, device="meta")
    for zero, groups, expected in (
        ({"stage": 1}, [3000, 1000], 6 * 1500),
        ({"stage": 3}, [3000, 1000], 6 * 1500),
        ({"stage": 3, "sub_group_size": 500}, [3000], 6 * 500),
    ):
        part = of(
            passing(
                nn.Sequential(*[nn.Linear(8, 8, bias=False, device="meta")] * 2),
                {"zero_optimization": zero},
                "bf16",
                2,
                None,
                groups,
            ),
            "fp32 gradients of a group",
        )
        assert (part.device, part.phases) == (expected, ("update",))
    assert (
        of(
            passing(model, {"zero_optimization": {"stage": 3, **GRADIENT_OFF}}, "bf16", 2, None, [64 * 64]),
            "fp32 gradients of a group",
        ).device
        == 0
    )
