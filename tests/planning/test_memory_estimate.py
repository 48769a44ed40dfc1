"""The memory of a process against sums made by hand, of a layer of a million parameters on 2 ranks."""

from dataclasses import replace

import pytest
from torch import nn

from internseg_ds.planning.activation_memory import Activations
from internseg_ds.planning.memory_estimate import (
    EvaluationPass,
    MemoryEstimate,
    Platform,
    Run,
    estimate_memory,
)
from internseg_ds.planning.zero_settings import ZeroSettings

GIB = 2**30
CONTEXT, PROCESS = 2 * GIB, 4 * GIB
LAYER = nn.Linear(1000, 1000, bias=False, device="meta")
ACTIVATIONS = Activations(batch=100, kept=200, saved=400, heads=1000, blocks=500)
EVALUATION = EvaluationPass((10, 10), 3, lambda windows: windows * 10**6, batch=8, in_step=1, weights="auto")
HOST = Platform(8 * GIB, on_gpu=False)


def run(stage: int, **more) -> Run:
    settings = ZeroSettings({"stage": stage, "reduce_bucket_size": 1000, "overlap_comm": True}, "bf16", 2)
    return Run(LAYER, settings, [10**6], ACTIVATIONS, **more)


def parts(memory: MemoryEstimate, start: str = "") -> dict[str, int]:
    return {part.name: part.device for part in memory.parts if part.name.startswith(start)}


def test_the_phases_of_zero_1():
    memory = estimate_memory(run(1), HOST)
    # weights 2 MB, half of the gradients 1 MB, half of the optimizer 6 MB; two buckets of 2 kB; activations
    assert memory.device("train") == 9_000_000 + 4000 + 1000 + 0.05 * (1_000_000 + 5000) + CONTEXT
    # norms in fp64 take more than half of the gradients in fp32: 8 MB
    assert memory.device("update") == 9_000_000 + 8_000_000 + 0.05 * 9_000_000 + CONTEXT
    assert memory.device("evaluate") == 8_000_000 + CONTEXT
    assert (memory.fullest, memory.peak) == ("update", 17_450_000 + CONTEXT)
    assert (memory.state_on_device, memory.state_on_host, memory.host) == (9_000_000, 0, PROCESS)
    assert (memory.checkpoint, memory.consolidated) == (12_000_000 + 2_000_000, 4_000_000)


def test_a_gpu_keeps_six_percent_free_and_a_host_nothing():
    peak = 17_450_000 + CONTEXT  # 2.165 GB; 6 % of 2.4 GB are 144 MB, of 2.3 GB 138
    for size, fits in ((2_400_000_000, True), (2_300_000_000, False)):
        assert estimate_memory(run(1), Platform(size)).fits is fits
    assert estimate_memory(run(1), Platform(2_400_000_000)).needed == peak + 144_000_000
    for size, fits in ((peak, True), (peak - 1, False)):
        assert estimate_memory(run(1), replace(HOST, device_bytes=size)).fits is fits


def test_a_host_must_hold_all_of_its_processes():
    for size, fits in ((8 * PROCESS, True), (8 * PROCESS - 1, False)):
        memory = estimate_memory(run(1), Platform(8 * GIB, per_host=8, host_bytes=size))
        assert (memory.whole_host, memory.fits_device) == (8 * PROCESS, True)
        assert memory.fits_host is memory.fits is fits


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_has_the_weights_that_do_not_train(stage):
    frozen = nn.Linear(1000, 1000, bias=False, device="meta").requires_grad_(False)
    memory = estimate_memory(replace(run(stage), model=nn.Sequential(LAYER, frozen)), HOST)
    # masters and moments of what trains; beside them, all weights in bf16, or those that do not train
    assert memory.checkpoint == 12_000_000 + {1: 4_000_000, 3: 2_000_000}[stage]


@pytest.mark.parametrize(("stage", "weights"), [(1, 2_000_000), (3, 0)])
def test_the_moving_average_and_the_background_save(stage, weights):
    plain = estimate_memory(run(stage), HOST)
    more = estimate_memory(run(stage, ema=True, background_save=True), HOST)
    assert parts(more)["moving average"] == 2_000_000
    # half of the masters, moments and average; under ZeRO-1 the weights of the module too
    assert more.host - plain.host == 8_000_000 + weights
    assert more.checkpoint - plain.checkpoint == 4_000_000


def test_a_background_save_copies_the_share_of_what_does_not_train_too():
    frozen = nn.Linear(1000, 1000, bias=False, device="meta").requires_grad_(False)
    both = replace(run(3), model=nn.Sequential(LAYER, frozen))
    more = estimate_memory(replace(both, background_save=True), HOST).host - estimate_memory(both, HOST).host
    assert more == 6_000_000 + 1_000_000


def test_one_process_under_zero_3_evaluates_with_its_own_weights():
    alone = replace(run(3).settings, world_size=1)
    offloaded = replace(alone, zero={**alone.zero, "offload_param": {"device": "cpu"}})
    for settings, copied in ((alone, 0), (offloaded, 2_000_000)):
        memory = estimate_memory(replace(run(3, evaluation=EVALUATION), settings=settings), HOST)
        found = parts(memory, "evaluation")
        assert found["evaluation: a whole copy of the weights"] == copied
        assert "evaluation: 8 windows" in found


# ZeRO-3 holds 1 MB of weights, 1 of gradients, 6 of the optimizer and a bucket; the numbers are bytes beside it
USED = 8_000_000 + 2000 + CONTEXT


@pytest.mark.parametrize(
    ("free", "weights", "copied", "windows"),
    [
        (3_333_334, "auto", True, 1),  # 60 % of it are the 2 MB of whole weights
        (3_333_333, "auto", False, 1),
        (3_333_333, "whole", True, 1),
        (100_000_000, "partitioned", False, 1),
        # weights 2 MB, logits 5.2 kB, a window 1 MB, and 5 % of these
        (10_505_460, "auto", True, 8),
        (10_505_459, "auto", True, 4),
        (6_305_460, "auto", True, 4),
        (6_305_459, "auto", True, 2),
    ],
)
def test_an_evaluation_copies_the_weights_and_runs_windows_as_there_is_room(free, weights, copied, windows):
    evaluation = replace(EVALUATION, weights=weights)
    memory = estimate_memory(run(3, evaluation=evaluation), replace(HOST, device_bytes=USED + free))
    found = parts(memory, "evaluation")
    assert found.get("evaluation: a whole copy of the weights", 0) == (2_000_000 if copied else 0)
    name = f"evaluation: {windows} window{'s' if windows > 1 else ''}"
    assert found[name] == windows * 10**6
    # fp32 of 3 classes and 10 x 10 pixels, counts of windows, and three chunks being resized
    assert found["evaluation: logits of an image"] == 1200 + 400 + 3 * 1200
