import pytest

from internseg_ds.planning.block_work import BlockPass, BlockWork
from internseg_ds.planning.collectives import Collective, Traffic
from internseg_ds.planning.devices import DEVICES, Cluster, Device
from internseg_ds.planning.flops import TrainingPass
from internseg_ds.planning.step_time import (
    ADAM_BYTES,
    Assumptions,
    StepWork,
    communication_seconds,
    newton_schulz_flops,
    step_time,
)
from internseg_ds.planning.zero_settings import ZeroSettings

GPU = Device(
    "test",
    bf16=100,
    tf32=50,
    fp32=5,
    float8=200,
    memory_gib=74.5,
    memory_gbs=1000,
    nvlink_gbs=100,
    host_gbs=10,
)
PLAIN = Assumptions(compute=0.5, link=1.0, hop_within_s=0, hop_between_s=0, host_memory_gbs=80)
PASS = TrainingPass(
    (),
    backbone_forward=10**12,
    backbone_backward=3 * 10**12,
    backbone_recomputed=10**12,
    heads_forward=10**12,
    heads_backward=10**12,
)
COMPUTE_S = 2 * (4 / 100 + 2 / 50) / 0.5  # two images
STATE = 10**9


def gather(gigabytes: float, ranks: int = 2, calls: int = 1, what: str = "weights") -> Collective:
    """An all-gather of which each of the ranks sends so much."""
    return Collective("all_gather", what, int(gigabytes * 1e9 * ranks / (ranks - 1)), calls, ranks)


def time_of(micro_batches, after=(), zero=None, nodes=1, per_node=2, host_bytes=0, **more):
    work = StepWork(
        PASS, 2, Traffic(tuple(micro_batches), tuple(after)), STATE, host_bytes=host_bytes, **more
    )
    settings = ZeroSettings(zero or {"stage": 3}, "bf16", nodes * per_node)
    return step_time(work, settings, Cluster(GPU, nodes, per_node, 10), PLAIN)


def test_computation_takes_its_flops_at_the_share_of_the_peak_that_is_reached():
    time = time_of([()])
    assert time.floor == pytest.approx(COMPUTE_S / 2)
    assert time.compute == pytest.approx(COMPUTE_S)
    assert time.update == pytest.approx(ADAM_BYTES * STATE / 2 / 1e12)
    assert time.total == pytest.approx(time.compute + time.update)


def test_muons_iterations_are_divided_among_all():
    # 5 times 2 x 3 x 3 x 4 twice, and 2 x 3 x 3 x 3
    assert newton_schulz_flops([(3, 4), (4, 3)]) == 2 * 5 * (2 * 72 + 54)
    size = 10_000
    more = time_of([()], matrices=[(size, size)]).update - time_of([()]).update
    assert more == pytest.approx(30 * size**3 / 2 / 100e12 / 0.5)


def test_heads_in_bf16_run_at_the_backbones_rate():
    assert time_of([()], heads="bf16").compute == pytest.approx(2 * (4 + 2) / 100 / 0.5)


def test_heads_in_full_fp32_run_at_the_rate_without_tensor_cores():
    assert time_of([()], heads="fp32").compute == pytest.approx(2 * (4 / 100 + 2 / 5) / 0.5)


GIGA = 10**9
BLOCKS = BlockWork(
    BlockPass(GIGA, 500 * GIGA, 2 * GIGA, 6 * GIGA),
    BlockPass(GIGA, 500 * GIGA, 3 * GIGA, 6 * GIGA),
    BlockPass(GIGA, 500 * GIGA, 2 * GIGA, 6 * GIGA),
)


def test_compiled_blocks_save_traffic_of_their_elementwise_work():
    """Of two images: 9 units forward, 18 backward, 9 recomputed, of 2 x 1 GB each."""
    small = BlockWork(*[BlockPass(GIGA // 2)] * 3)
    plain, compiled = time_of([()]), time_of([()], blocks=small, compiled=True)
    assert plain.compute - compiled.compute == pytest.approx((9 + 18 + 9) * 2 / 1000)
    assert compiled.floor == plain.floor


def test_float8_products_run_at_their_rate_and_cost_conversions():
    plain = time_of([()])
    eager = time_of([()], blocks=BLOCKS, float8=True)
    # 2 images x 3 x 0.5 TFLOP at 200 in place of 100 TFLOP/s
    assert plain.floor - eager.floor == pytest.approx(0.015)
    converted = 2 * (2 + 3 + 2) + 3 * 6  # weights once for both images
    assert eager.compute == pytest.approx(eager.floor / 0.5 + 13 * converted / 1000)
    both = time_of([()], blocks=BLOCKS, float8=True, compiled=True)
    assert both.compute == pytest.approx(eager.floor / 0.5 + (5 * converted - 36 * 4) / 1000)


def test_no_option_makes_a_step_shorter_than_its_floor():
    huge = BlockWork(*[BlockPass(10**13)] * 3)
    time = time_of([()], blocks=huge, compiled=True)
    assert time.compute == time.floor


def test_float8_on_a_device_without_it_is_an_error():
    work = StepWork(PASS, 2, Traffic(((),), ()), STATE, blocks=BLOCKS, float8=True)
    with pytest.raises(ValueError, match="A100 has no rate of float8"):
        step_time(work, ZeroSettings({"stage": 3}, "bf16", 1), Cluster(DEVICES["A100"], 1, 1, 10), PLAIN)


def test_communication_hides_behind_computation_where_the_settings_let_it():
    hidden, longer = gather(8), gather(40)  # 0.08 and 0.4 s beside 0.32 s
    assert time_of([(hidden,)]).waiting == pytest.approx(0)
    assert time_of([(longer,)]).waiting == pytest.approx(0.4 - COMPUTE_S)
    assert time_of([(hidden,)], zero={"stage": 3, "overlap_comm": False}).waiting == pytest.approx(0.08)
    # DeepSpeed overlaps in ZeRO-3 alone unless it is told to
    assert time_of([(hidden,)], zero={"stage": 1}).waiting == pytest.approx(0.08)
    assert time_of([(gather(8, what="batch norm"),)]).waiting == pytest.approx(0.08)
    assert time_of([(), ()], after=[hidden]).waiting == pytest.approx(0.08)


def test_zero_1_and_2_hide_gradients_behind_the_backward_pass_alone_and_never_the_last_bucket():
    """Of the 0.32 s, 3/4 of the backbone's 0.16 and half of the heads' 0.16 are backward: 0.2 s."""
    zero = {"stage": 2, "overlap_comm": True}
    assert time_of([(gather(8, calls=4, what="gradients"),)], zero=zero).waiting == pytest.approx(0.08 / 4)
    assert time_of([(gather(40, calls=4, what="gradients"),)], zero=zero).waiting == pytest.approx(0.4 - 0.2)
    assert time_of([(gather(40, calls=1, what="gradients"),)], zero=zero).waiting == pytest.approx(0.4)


def test_micro_batches_wait_for_their_own_communication_only():
    time = time_of([(gather(40),), ()])
    assert time.total == pytest.approx(0.4 + COMPUTE_S + time.update)
    assert time.communication == pytest.approx(0.4)


def test_the_slower_link_decides():
    cluster = Cluster(GPU, nodes=2, per_node=2, between_gbs=10)
    # half of it leaves the node
    assert communication_seconds([gather(8, ranks=4)], cluster, PLAIN) == pytest.approx(4 / 10)
    assert communication_seconds([gather(8, ranks=2)], cluster, PLAIN) == pytest.approx(8 / 100)


def test_each_call_takes_its_hops():
    cluster, slow = (
        Cluster(GPU, nodes=2, per_node=2, between_gbs=10),
        Assumptions(link=1.0, hop_within_s=1, hop_between_s=10),
    )
    assert communication_seconds([gather(0, ranks=4, calls=3)], cluster, slow) == 3 * (2 + 20)
    assert communication_seconds([Collective("all_reduce", "gradients", 0, 1, 4)], cluster, slow) == 2 * (
        2 + 20
    )
    assert communication_seconds([gather(0, ranks=2)], cluster, slow) == 1


def test_compiled_conversions_make_the_update_of_compact_states_shorter():
    def update(**more) -> float:
        work = StepWork(PASS, 2, Traffic(((),), ()), STATE, **more)
        settings = ZeroSettings({"stage": 3}, "bf16", 2, optimizer_states="8bit")
        return step_time(work, settings, Cluster(GPU, 1, 2, 10), PLAIN).update

    assert update() == pytest.approx(297 * STATE / 2 / 1e12)
    assert update(compiled_update=True) == pytest.approx(72 * STATE / 2 / 1e12)


def test_an_offloaded_update_runs_at_the_speed_of_the_hosts_memory():
    time = time_of([()], zero={"stage": 3, "offload_optimizer": {"device": "cpu"}}, host_bytes=2 * 10**9)
    assert time.host == pytest.approx(0.2)
    assert time.update == pytest.approx(ADAM_BYTES * STATE / 2 / (80e9 / 2))
    assert time.total == pytest.approx(COMPUTE_S + time.host + time.update)


def test_devices_multiply_fp32_slower_than_tf32():
    assert all(0 < device.fp32 < device.tf32 for device in DEVICES.values())


def test_devices_multiply_float8_at_twice_the_rate_of_bf16_or_not_at_all():
    rates = {name: device.float8 / device.bf16 for name, device in DEVICES.items() if device.float8}
    assert all(1.9 < rate < 2.1 for rate in rates.values())
    assert not rates.keys() & {"A100", "A100-40GB", "A6000", "MI300X"}  # none, or not e4m3


def test_devices_multiply_tf32_at_half_the_rate_of_bf16_and_their_links_are_slower_than_their_memory():
    assert all(
        device.name == name and 1.9 < device.bf16 / device.tf32 < 2.2 for name, device in DEVICES.items()
    )
    assert all(device.host_gbs <= device.nvlink_gbs < device.memory_gbs for device in DEVICES.values())
