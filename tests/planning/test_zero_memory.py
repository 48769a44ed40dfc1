import pytest
from torch import nn

from internseg_ds.planning.flops import Use
from internseg_ds.planning.zero_memory import Part, model_states, pinned_rounding, temporary_buffers
from internseg_ds.planning.zero_settings import ZeroSettings

N = 64
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def of(parts: list[Part], name: str) -> Part:
    return next((part for part in parts if part.name == name), Part(name))


def states(model: nn.Module, zero: dict, precision: str = "bf16", ranks: int = N, accumulation: int = 1):
    return model_states(model, ZeroSettings(zero, precision, ranks, accumulation))


def buffers(model: nn.Module, zero: dict, groups: list[int], uses: list[Use] | None = None, ranks: int = 2):
    return temporary_buffers(model, ZeroSettings(zero, "bf16", ranks), groups, uses)


# bytes per parameter of weights, gradients, optimizer, by ZeRO's table 1
@pytest.mark.parametrize(
    ("zero", "precision", "expected"),
    [
        ({"stage": 0}, "bf16", (2, 2, 12)),
        ({"stage": 2}, "bf16", (2, 2 / N, 12 / N)),
        ({"stage": 3}, "bf16", (2 / N, 2 / N, 12 / N)),
        ({"stage": 3}, "autocast", (4 / N, 4 / N, 12 / N)),
        ({"stage": 0}, "fp32", (4, 4, 8)),
    ],
)
def test_bytes_per_parameter_are_those_of_the_zero_paper(zero, precision, expected):
    parts = states(nn.Linear(640, 640, bias=False, device="meta"), zero, precision)
    assert [part.device / 640**2 for part in parts] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stage", "states", "bf16_master", "optimizer", "update"),
    [
        (3, "fp32", False, 12, 2 + 4),
        (1, "bf16", False, 8, 2 + 4 + 32),
        (2, "8bit", False, 6 + 8 / 256, 2 + 4 + 32),
        (3, "bf16", True, 6, 2 + 32),  # gradients stay bf16
        (3, "8bit", True, 4 + 8 / 256, 2 + 32),
    ],
)
def test_fewer_bytes_of_optimizer_state(stage, states, bf16_master, optimizer, update):
    """update: per element while a group of 640 x 640 is updated, which is less than a chunk."""
    model = nn.Linear(640, 640, bias=False, device="meta")
    settings = ZeroSettings({"stage": stage}, "bf16", 1, 1, states, bf16_master)
    assert of(model_states(model, settings), "optimizer").device / 640**2 == pytest.approx(optimizer)
    parts = temporary_buffers(model, settings, [640**2], None)
    assert of(parts, "fp32 gradients of a group").device / 640**2 == max(update, 8)


@pytest.mark.parametrize(
    ("more", "accumulation", "expected"),
    [
        ({"stage": 1, "overlap_comm": True}, 1, 2 / N),  # each gradient is reduced as it is made
        # the last micro-batch reduces what the others piled up
        ({"stage": 1, "overlap_comm": True}, 2, 2 + 2 / N),
        ({"stage": 1}, 1, 2 + 2 / N),
        ({"stage": 2}, 2, 2 * 2 / N),
        ({"stage": 3}, 2, 2 / N),
    ],
)
def test_gradients_pile_up_as_deepspeed_reduces_them(more, accumulation, expected):
    parts = states(nn.Linear(640, 640, bias=False, device="meta"), more, accumulation=accumulation)
    assert sum(
        part.device for part in parts if "gradients" in part.name and "train" in part.phases
    ) / 640**2 == pytest.approx(expected)


def test_muon_keeps_one_moment_of_matrices_and_puts_them_together():
    layer, matrices = nn.Linear(640, 640, bias=False, device="meta"), [(640, 640)]
    settings = ZeroSettings({"stage": 3}, "bf16", 4)
    parts = model_states(layer, settings, matrices)
    assert of(parts, "optimizer").device == 8 * 640**2 // 4
    whole = of(temporary_buffers(layer, settings, [640**2], None, matrices), "whole matrices (Muon)")
    # a quarter is sent, another one is received, both in fp32
    assert whole.device == (2 * 4 / 4 + 24) * 640**2 and whole.phases == ("update",)
    assert not of(temporary_buffers(layer, settings, [640**2], None), "whole matrices (Muon)").device


def test_frozen_parameters_have_weights_only():
    model = nn.Linear(64, 64, bias=False, device="meta").requires_grad_(False)
    assert [part.device for part in states(model, {}, ranks=1)] == [2 * 64 * 64, 0, 0]


def test_offloaded_state_lies_on_the_host_with_its_gradients_in_both_dtypes():
    parts = states(nn.Linear(4, 4, bias=False), {"stage": 3, **OFFLOADED}, ranks=1)
    assert {part.name: (part.device // 16, part.host // 16) for part in parts} == {
        "weights": (2, 0),
        "gradients": (0, 2),
        "optimizer": (0, 12),
        "gradients in fp32": (0, 4),
    }


def test_hpz_keeps_a_second_copy_of_the_weights_within_each_node():
    model = nn.Linear(640, 640, bias=False, device="meta")
    parts = states(model, {"stage": 3, "zero_hpz_partition_size": 8})
    assert parts[-1] == Part("second copy (hpZ)", 2 * 640 * 640 // 8)
    assert parts[:-1] == states(model, {"stage": 3})


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
        return of(buffers(model, zero, [300], uses, world_size), "gathered weights").device

    assert gathered(alone) == 2 * 100
    assert gathered({**alone, "stage3_max_reuse_distance": 1000}) == 2 * 300
    # two that come together are copied out of one buffer
    assert gathered({**alone, "stage3_prefetch_bucket_size": 200}) == 2 * (300 + 200)
    assert gathered(alone, world_size=1) == 0  # one process computes with its partition
    assert gathered({**alone, "offload_param": {"device": "cpu"}}, world_size=1) == 2 * 100
    for zero in (alone, {**alone, "stage3_max_reuse_distance": 1000}):
        assert gathered(zero, uses=None) >= gathered(zero)  # the upper bound


def test_buckets_are_doubled_where_communication_overlaps():
    model = nn.Linear(64, 64, bias=False, device="meta")
    for zero, expected in (
        ({"stage": 2}, 1),
        ({"stage": 2, "overlap_comm": True}, 2),
        ({"stage": 3, "overlap_comm": True}, 1),
    ):
        parts = buffers(model, {"reduce_bucket_size": 1000, **zero}, [64 * 64])
        assert of(parts, "communication buckets").device == expected * 2 * 1000
    of_deepspeed = of(buffers(model, {"stage": 1}, [64 * 64]), "communication buckets")
    assert of_deepspeed.device == 2 * 500_000_000


def test_an_update_makes_the_gradients_of_one_group_fp32():
    model = nn.Linear(64, 64, bias=False, device="meta")
    for zero, groups, expected in (
        ({"stage": 1}, [3000, 1000], 6 * 1500),
        ({"stage": 3}, [3000, 1000], 6 * 1500),
        ({"stage": 3, "sub_group_size": 500}, [3000], 6 * 500),
    ):
        small = nn.Sequential(*[nn.Linear(8, 8, bias=False, device="meta")] * 2)
        part = of(buffers(small, zero, groups), "fp32 gradients of a group")
        assert (part.device, part.phases) == (expected, ("update",))
    offloaded = buffers(model, {"stage": 3, **OFFLOADED}, [64 * 64])
    assert of(offloaded, "fp32 gradients of a group").device == 0


def test_page_locked_buffers_are_rounded_up_to_powers_of_two(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    model = nn.Linear(100, 10, bias=False, device="meta")
    pinned = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}

    def rounding(zero: dict) -> int:
        return pinned_rounding(model, ZeroSettings(zero, "bf16", 2), [1000])

    # ZeRO-3: 2 x 500 bytes of gradients become 1024, 4 x 500 of fp32 gradients 2048
    assert rounding({"stage": 3, **pinned}) == 24 + 48
    # ZeRO-2: 4 x 500 of master weights and of gradients 2048 each, 2 x 1000 of the largest gradient 2048
    assert rounding({"stage": 2, **pinned}) == 3 * 48
    assert rounding({"stage": 3, **OFFLOADED}) == rounding({"stage": 3}) == 0
