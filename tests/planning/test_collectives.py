import pytest
from torch import nn

from internseg_ds.errors import ConfigError
from internseg_ds.planning.collectives import (
    Collective,
    Traffic,
    batch_norm_collectives,
    buckets,
    host_bytes,
    step_traffic,
)
from internseg_ds.planning.flops import Use
from internseg_ds.planning.zero_settings import ZeroSettings

N = 4
ALWAYS = {
    "stage": 3,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def two_layers() -> tuple[nn.Module, list[Use]]:
    """40 and 80 weights, used forwards and backwards."""
    model = nn.Sequential(
        nn.Linear(4, 10, bias=False, device="meta"), nn.Linear(10, 8, bias=False, device="meta")
    )
    return model, [Use(name, begins) for name in ("0", "1", "1", "0") for begins in (True, False)]


def traffic(zero: dict, accumulation: int = 1, world_size: int = N) -> Traffic:
    model, uses = two_layers()
    return step_traffic(model, ZeroSettings(zero, "bf16", world_size, accumulation), [120], uses)


def sent(estimated: Traffic) -> float:
    return sum(part.sent for part in estimated)


def test_a_ring_sends_all_but_its_own_share_and_an_all_reduce_does_so_twice():
    assert Collective("all_gather", "weights", 800, 1, 4).sent == 600
    assert Collective("reduce_scatter", "gradients", 800, 1, 4).sent == 600
    assert Collective("all_reduce", "gradients", 800, 1, 4).sent == 1200
    assert Collective("all_gather", "weights", 800, 1, 1).sent == 0


def test_muon_exchanges_its_matrices_there_and_back_under_zero_3():
    model, uses = two_layers()
    for stage, wanted in ((3, 2), (1, 0)):
        settings = ZeroSettings({"stage": stage, "sub_group_size": 20}, "bf16", 4)
        plain, with_muon = (
            step_traffic(model, settings, [120], uses, matrices) for matrices in ((), [(10, 4), (8, 10)])
        )
        # 3 of 4 parts of 30 elements in fp32, in 2 sub-groups
        assert sent(with_muon) - sent(plain) == wanted * 4 * 30 * 3 / 4
        calls = sum(part.calls for part in with_muon) - sum(part.calls for part in plain)
        assert calls == 2 * wanted
    # to 12 of 15 others, which are on other nodes
    assert Collective("all_to_all", "matrices", 1600, 1, 16).sent_by_link(4) == pytest.approx((300, 1200))


def test_each_gpu_of_a_node_carries_its_part_of_what_leaves_the_node():
    wide = Collective("all_gather", "weights", 1600, 1, 16)
    assert wide.sent_by_link(8) == (1500 * 7 / 8, 1500 / 8)
    assert Collective("all_gather", "weights", 1600, 1, 8).sent_by_link(8) == (1400, 0)
    assert wide.sent_by_link(1) == (0, 1500)


# of 240 bytes, and 3 of 4 shares: reductions count twice
@pytest.mark.parametrize(
    ("stage", "accumulation", "times"),
    [
        (0, 1, 2),
        (0, 3, 2),
        (1, 1, 2 + 1),
        (1, 3, 2 + 1),
        (2, 1, 2 + 1),
        (2, 3, 3 * 2 + 1),
        (3, 1, 2 + 1),
        (3, 3, 3 * (2 + 1)),  # two gathers and a reduce-scatter in each micro-batch
    ],
)
def test_what_each_stage_sends(stage, accumulation, times):
    # "1" is needed twice in a row and stays in between only where something is kept: with nothing kept, all
    # 120 weights are gathered twice
    assert sent(traffic({**ALWAYS, "stage": stage}, accumulation)) == times * 240 * 3 / 4


def test_one_process_alone_sends_nothing():
    for stage in (1, 2, 3):
        assert sent(traffic({**ALWAYS, "stage": stage}, world_size=1)) == 0


def test_hpz_gathers_over_all_processes_once_a_step_and_then_within_the_node():
    estimated = traffic({**ALWAYS, "zero_hpz_partition_size": 2}, accumulation=3)
    gathered = [
        {part.ranks: part.payload for part in micro_batch if part.what == "weights"}
        for micro_batch in estimated.micro_batches
    ]
    assert gathered == [{4: 240, 2: 240}, {2: 480}, {2: 480}]
    # one gather, three reductions leave the node
    assert sum(part.sent_by_link(2)[1] for part in estimated) == (240 + 3 * 240) * 3 / 4 / 2


def test_small_parameters_are_gathered_once_after_the_step():
    estimated = traffic({**ALWAYS, "stage3_param_persistence_threshold": 40}, accumulation=2)
    assert [(part.payload, part.calls) for part in estimated.after] == [(80, 1)]
    assert [
        part.payload
        for micro_batch in estimated.micro_batches
        for part in micro_batch
        if part.what == "weights"
    ] == [320, 320]


def test_sizes_that_do_not_divide_are_padded():
    model = nn.Linear(5, 1, bias=False, device="meta")
    uses = [Use("", True), Use("", False)]
    three = step_traffic(model, ZeroSettings(ALWAYS, "bf16", N), [5], uses)
    assert {part.payload for part in three if part.calls} == {16}
    one = step_traffic(model, ZeroSettings({"stage": 1}, "bf16", N), [5], uses)
    assert [part.payload for part in one] == [10, 16]  # partitions start at multiples of 2 elements


def test_frozen_weights_are_gathered_but_have_no_gradients():
    model, uses = two_layers()
    model[0].requires_grad_(False)
    estimated = step_traffic(model, ZeroSettings(ALWAYS, "bf16", N), [80], uses)
    assert [part.payload for part in estimated if part.what == "gradients"] == [160]
    assert sum(part.payload for part in estimated if part.what == "weights") == 480


def test_batch_norms_exchange_their_moments_each_way():
    model = nn.Sequential(nn.SyncBatchNorm(16), nn.SyncBatchNorm(8), nn.BatchNorm2d(100))
    forward, backward = batch_norm_collectives(model, N)
    assert (forward.kind, forward.payload, forward.calls) == ("all_gather", 4 * (33 + 17) * N, 2)
    assert (backward.kind, backward.payload, backward.calls) == ("all_reduce", 4 * (32 + 16), 2)
    assert batch_norm_collectives(nn.BatchNorm2d(4), N) == []


def test_gradients_are_reduced_in_buckets():
    assert buckets([10, 10, 10], 100) == 1
    assert buckets([10, 10, 10], 20) == 2
    assert buckets([10, 30, 10], 20) == 3  # one that is larger than the bucket goes alone
    assert buckets([], 20) == 0


def test_what_is_offloaded_crosses_the_link_to_the_host():
    model, uses = two_layers()
    share = 240 // N
    for offloaded, accumulation, expected in (
        ({}, 2, 0),
        # gradients down and up, in fp32 down, weights up: 10 bytes a parameter
        ({"offload_optimizer": {"device": "cpu"}}, 1, (2 + 2 + 1) * share),
        # sums of gradients up and down once more
        ({"offload_optimizer": {"device": "cpu"}}, 2, (4 + 2 + 1) * share),
        # weights up for each gather
        (
            {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
            1,
            (2 + 2 + 2) * share,
        ),
        # in fp32 down, weights up
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 1, (2 + 1) * share),
        # whole gradients down and up between
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 2, (2 * N + 2 + 1) * share),
    ):
        settings = ZeroSettings({**ALWAYS, **offloaded}, "bf16", N, accumulation)
        estimated = step_traffic(model, settings, [120], uses)
        assert host_bytes(model, settings, estimated) == expected


def test_settings_that_change_what_is_sent_are_refused():
    with pytest.raises(ConfigError, match="zero_quantized_weights=True"):
        traffic({**ALWAYS, "zero_quantized_weights": True})
