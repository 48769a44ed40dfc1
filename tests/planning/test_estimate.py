import logging
import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import ConfigError
from internseg_ds.planning import estimate as estimating
from internseg_ds.planning.collectives import batch_norm_collectives
from internseg_ds.planning.devices import DEVICES, Cluster
from internseg_ds.planning.estimate import (
    Estimate,
    compare,
    estimate,
    estimate_scaling,
    fastest,
    without_zero,
)
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.image_sizes import crop_size, evaluation_size
from internseg_ds.planning.memory_warnings import shortfall
from internseg_ds.planning.step_time import Assumptions, StepTime
from internseg_ds.planning.tables import conclusion, frozen_weights, print_without_zero, verdict
from tests.conftest import ROOT, TINY

OURS = ROOT / "ds_configs"
H100 = DEVICES["H100"]
STEPS, BATCH = 420, 8
"""Of the tiny config."""


def estimator_of(**options) -> Estimator:
    return Estimator(read_experiment(ROOT / TINY, options))


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return estimator_of(**{"engine.global_batch": 32})


@pytest.fixture(scope="module")
def small() -> Estimate:
    """ZeRO-3 on a node of 8 GPUs."""
    return estimate(
        estimator_of(**{"engine.global_batch": 32}), OURS / "zero3_bf16.json", eight(), Assumptions()
    )


def eight(gpu_gib: float = 32, host_bytes: float | None = None) -> Cluster:
    return Cluster(replace(H100, memory_gib=gpu_gib), 1, 8, 50.0, host_bytes)


def over_nodes(zero: dict, nodes: tuple[int, ...] = (1, 2), **options) -> list[Estimate]:
    """Nodes of 2 GPUs."""
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": zero}
    clusters = [Cluster(H100, count, 2, 50.0) for count in nodes]
    return estimate_scaling(estimator_of(**options), ds_config, clusters, Assumptions())


def test_what_is_offloaded_to_a_host_that_is_too_small_does_not_fit(estimator):
    found = estimate(estimator, OURS / "zero3_bf16_offload_all.json", eight(host_bytes=2**30), Assumptions())
    assert found.memory.fits_device and not found.memory.fits_host and not found.memory.fits
    assert "does not fit" in verdict(found.memory)


def test_the_moving_average_and_the_background_save_of_the_experiment_are_estimated(small):
    more = estimate(
        estimator_of(**{"engine.global_batch": 32, "engine.ema": 0.9, "engine.background_save": True}),
        OURS / "zero3_bf16.json",
        eight(),
        Assumptions(),
    )
    names = {part.name for part in more.memory.parts} - {part.name for part in small.memory.parts}
    assert names == {"moving average", "save in the background"}


def test_compiled_blocks_and_float8_products_change_the_time(small):
    def step(ds_config: Path | dict, cluster: Cluster, **options) -> Estimate:
        options = {f"engine.{name}": value for name, value in options.items()}
        found = estimator_of(**{"engine.global_batch": 32, "engine.recomputation": "none", **options})
        return estimate(found, ds_config, cluster, Assumptions(), evaluates=False)

    plain, compiled, float8 = (
        step(OURS / "zero3_bf16.json", eight(), **options)
        for options in ({}, {"compile": True}, {"matmul_dtype": "float8"})
    )
    assert compiled.step.time.compute < plain.step.time.compute
    assert float8.step.time.floor < plain.step.time.floor
    # hooks on layers: nothing is compiled
    on_layers = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    assert step(on_layers, eight(), compile=True).step == step(on_layers, eight()).step
    old = step(OURS / "zero3_bf16.json", Cluster(DEVICES["A100"], 1, 8, 50.0), matmul_dtype="float8")
    assert old.step is None and "A100, which does not multiply float8" in old.untimed
    autocast = step(OURS / "zero3_autocast.json", eight(), matmul_dtype="float8")
    assert autocast.step is None and "needs bf16 weights" in autocast.untimed


def test_the_fastest_of_what_fits_is_named(small):
    def variant(seconds: float, **memory) -> Estimate:
        step = replace(small.step, time=replace(small.step.time, total=seconds))
        return replace(small, step=step, memory=replace(small.memory, **memory))

    a, b, c = Path("a.json"), Path("b.json"), Path("c.json")
    too_large = replace(small.memory.platform, device_bytes=1.0)
    assert fastest({a: variant(2.0), b: variant(1.0), c: variant(0.5, platform=too_large)}) == b
    assert "These fit: a, b. Fastest: b, 1 s" in conclusion(
        {a: variant(2.0), b: variant(1.0), c: variant(0.5, platform=too_large)}
    )
    # as long to two digits: the one that leaves more memory, and whose state is on the GPU
    fewer = small.memory.others[:-1]  # without the context
    assert fastest({a: variant(1.0), b: variant(1.004, others=fewer), c: variant(1.02)}) == b
    on_host = tuple(replace(part, device=0, host=part.device) for part in small.memory.states)
    assert fastest({a: variant(1.0, states=on_host), b: variant(1.0)}) == b
    assert fastest({a: replace(small, step=None), b: "an error"}) is None
    assert "None of these ds_configs fits" in conclusion({a: variant(1.0, platform=too_large)})


def test_frozen_weights_stay_whole_where_they_fit_and_are_partitioned_where_they_do_not():
    """Of P bytes of weights ZeRO-3 sends 7/8 P on 8 GPUs for the forward pass; ZeRO-1 what trains alone."""
    frozen = estimator_of(
        **{"engine.tune": "head", "engine.global_batch": 32, "model.decode_head.channels": 8}
    )
    paths = [OURS / "zero1_bf16.json", OURS / "zero3_bf16.json"]
    found = compare(frozen, paths, eight(), Assumptions())
    one, three = (found[path] for path in paths)
    trained = sum(param.numel() for param in frozen.model.parameters() if param.requires_grad)
    whole = sum(param.numel() for param in frozen.model.parameters())
    assert one.frozen == three.frozen == pytest.approx(1 - trained / whole) and one.frozen > 0.5
    norms = batch_norm_bytes(frozen)
    # all-reduce (2) and all-gather (1) of what trains; all-gather of the frozen and of what trains (forward,
    # and backward where it was released), and its reduce-scatter
    assert one.step.within_node - norms == pytest.approx(3 * 2 * trained * 7 / 8, rel=0.02)
    gathered = three.step.within_node - norms - 2 * trained * 7 / 8
    assert 2 * whole * 7 / 8 <= 1.001 * gathered <= 1.1 * 2 * (whole + trained) * 7 / 8
    assert re.search(
        r"\d\d% of the weights are frozen, and they fit whole .*ZeRO-1 \(zero1", frozen_weights(found)
    )
    too_large = replace(one.memory, platform=replace(one.memory.platform, device_bytes=1.0))
    found[paths[0]] = replace(one, memory=too_large)
    assert "do not fit: ZeRO-3 (zero3_bf16) divides them." in frozen_weights(found)
    assert frozen_weights({paths[0]: one}) == ""
    assert frozen_weights(dict.fromkeys(paths, replace(one, frozen=0.2))) == ""


def test_on_one_gpu_where_neither_sends_anything_less_memory_decides():
    frozen = estimator_of(**{"engine.tune": "head", "model.decode_head.channels": 8})
    paths = [OURS / "zero1_bf16.json", OURS / "zero3_bf16.json"]
    found = compare(frozen, paths, Cluster(H100, 1, 1, 50.0), Assumptions())
    one, three = (found[path] for path in paths)
    less = replace(three, memory=replace(three.memory, states=one.memory.states[:1]))
    assert less.memory.peak < one.memory.peak and fastest({paths[1]: less, paths[0]: one}) == paths[0]
    assert three.memory.device("evaluate") == pytest.approx(one.memory.device("evaluate"), rel=0.02)
    for device, least in ((1, "zero1_bf16"), (-1, "zero3_bf16")):
        states = tuple(replace(part, device=part.device + device * 2**30) for part in three.memory.states)
        larger = replace(three, memory=replace(three.memory, states=states))
        assert f"as much as ZeRO-1: {least} takes least" in frozen_weights({paths[0]: one, paths[1]: larger})


def batch_norm_bytes(estimator: Estimator) -> float:
    """That each of 8 GPUs sends in a step."""
    return sum(part.sent for part in batch_norm_collectives(estimator.model, 8))


def test_a_ds_config_that_cannot_be_used_there_is_named_with_the_reason(estimator):
    two = Cluster(H100, 1, 2, 50.0)
    (found,) = compare(estimator, [OURS / "zero3_bf16_hpz.json"], two, Assumptions()).values()
    assert isinstance(found, str) and "zero_hpz_partition_size=8" in found


def test_hours_are_of_the_schedules_steps_or_of_as_many_images(monkeypatch):
    """Every step takes 2 s: 420 steps are 840 s."""
    monkeypatch.setattr(estimating, "step_time", lambda *_: StepTime(0.5, 1, 0.5, 0.25, 0.25, total=2.0))
    kept, larger = over_nodes({"stage": 3})
    assert (kept.ds.global_batch, kept.keeps_batch) == (BATCH, True)
    assert (larger.ds.global_batch, larger.keeps_batch) == (2 * BATCH, False)
    assert (kept.step.hours, kept.step.images_per_s) == (pytest.approx(840 / 3600), 4.0)
    assert (larger.step.hours, larger.step.images_per_s) == (pytest.approx(420 / 3600), 8.0)
    (free,) = over_nodes({"stage": 3}, nodes=(2,), **{"engine.global_batch": None})
    assert (free.ds.global_batch, free.keeps_batch) == (2 * BATCH, True)
    assert free.step.hours == pytest.approx(840 / 3600)
    assert free.step.time.not_computing == pytest.approx(0.5)
    assert free.step.time.waiting == pytest.approx(0.5)


def test_fewer_processes_accumulate_up_to_the_recipes_batch():
    (one,) = over_nodes({"stage": 2}, nodes=(1,), **{"engine.global_batch": 24})
    assert (one.ds.global_batch, one.ds.accumulation) == (24, 3)
    (odd,) = over_nodes({"stage": 2}, nodes=(1,), **{"engine.global_batch": 27})
    assert (odd.ds.global_batch, odd.ds.accumulation, odd.keeps_batch) == (24, 3, False)


def test_stages_trade_memory_for_communication():
    """On 8 GPUs, 2 per node, with one micro-batch of P parameters: state is 2 P + 2 P / 8 + 12 P / 8 under
    ZeRO-2, 16 P / 8 under ZeRO-3, and 2 P / 2 more with hpZ."""
    settings = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (two,) = over_nodes({"stage": 2}, nodes=(4,))
    (three,) = over_nodes(settings, nodes=(4,))
    (hpz,) = over_nodes({**settings, "zero_hpz_partition_size": 2}, nodes=(4,))
    (offloaded,) = over_nodes({"stage": 3, "offload_optimizer": {"device": "cpu"}}, nodes=(4,))
    params = sum(param.numel() for param in estimator_of().model.parameters())
    states = {
        "two": two.memory.state_on_device,
        "three": three.memory.state_on_device,
        "hpz": hpz.memory.state_on_device,
        "offloaded": offloaded.memory.state_on_device,
        "host": offloaded.memory.state_on_host,
    }
    per_parameter = {name: round(size / params, 3) for name, size in states.items()}
    # offloaded: gradients in both dtypes and the optimizer lie on the host
    assert per_parameter == {"two": 3.75, "three": 2.0, "hpz": 3.0, "offloaded": 0.25, "host": 2.25}
    assert three.step.between_nodes > hpz.step.between_nodes > 0
    assert offloaded.step.time.host > 0 == three.step.time.host


def test_pure_fp32_has_a_memory_and_no_time():
    estimator, cluster = estimator_of(), Cluster(DEVICES["A100"], 1, 2, 50.0)
    fp32 = {"zero_optimization": {"stage": 3}}
    found = estimate(estimator, fp32, cluster, Assumptions())
    assert found.step is None and "fp32" in found.untimed and found.memory.peak > 0
    with pytest.raises(ConfigError, match="fp32"):
        estimate_scaling(estimator, fp32, [cluster], Assumptions())


def test_the_crop_is_that_of_the_training_pipeline():
    experiment = read_experiment(ROOT / TINY)
    assert crop_size(experiment) == (112, 112)
    experiment.train.pipeline = [
        step for step in experiment.train.pipeline if step.type not in ("RandomCrop", "Pad")
    ]
    with pytest.raises(ConfigError, match=r"RandomCrop\.crop_size"):
        crop_size(experiment)


def test_evaluated_images_are_as_large_as_the_test_pipeline_makes_them():
    experiment = read_experiment(ROOT / TINY)
    assert evaluation_size(experiment) == (112, 448)
    experiment.val.pipeline[1].img_scale = [(448, 112), (600, 300)]
    assert evaluation_size(experiment) == (300, 600)
    experiment.val.pipeline[1].img_scale, experiment.val.pipeline[1].img_ratios = (448, 112), [0.5, 1.75]
    assert evaluation_size(experiment) == (196, 784)
    experiment.val.pipeline[1].img_scale = [(448, 112, 3)]  # mmcv reads the first two
    assert evaluation_size(experiment) == (196, 784)
    experiment.val.pipeline = experiment.val.pipeline[:1]
    assert evaluation_size(experiment) == (112, 112)


def warning(monkeypatch, memory: float, name: str = "zero2_bf16", **options) -> str | None:
    estimator = estimator_of(**{"engine.global_batch": None, **options})
    world = World(size=2, launcher="deepspeed")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 2 * memory}))
    return shortfall(estimator, estimator.resolve(OURS / f"{name}.json", world.size)[0], world)


def test_a_run_that_will_not_fit_is_warned_with_figures_and_a_fix(monkeypatch, caplog):
    assert warning(monkeypatch, 64 * 2**30) is None
    message = warning(monkeypatch, 3.5 * 2**30)  # the two buckets of ZeRO-2 alone take 1.9
    assert "it needs " in message and "there are 3.5" in message and "the largest part is" in message
    assert "ds_configs/zero3_bf16" in message and "would need" in message
    assert "none of the ds_configs beside it" in warning(monkeypatch, 0.5 * 2**30)
    # a test before may have left the level lower
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_that_is_small_beside_the_memory_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(Estimator, "training_memory", lambda *_, **__: pytest.fail("it was"))
    assert warning(monkeypatch, 64 * 2**30) is None


def test_a_model_without_an_estimate_is_a_line_of_the_log_and_no_error(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Estimator, "training_memory", lambda *_, **__: 1 / 0)
    assert warning(monkeypatch, 1.0) is None
    assert "could not be estimated: ZeroDivisionError" in caplog.text


def test_what_needs_no_zero_is_said_with_its_bytes(estimator):
    console = Console(record=True, width=200)
    memory = without_zero(estimator, eight())
    params = sum(param.numel() for param in estimator.model.parameters())
    held = {
        part.name: part.device for part in memory.parts if part.name in ("weights", "gradients", "optimizer")
    }
    assert held == {"weights": 4 * params, "gradients": 4 * params, "optimizer": 8 * params}
    assert sum(part.device for part in memory.parts if part.name == "communication buckets") == 4 * params
    print_without_zero(memory, console)
    assert f"{memory.peak / 2**30:.1f} GiB" in console.export_text()
    print_without_zero(without_zero(estimator, eight(gpu_gib=2)), console)
    assert not console.export_text()
