import pytest

from internseg_ds.engine.experiment import read_experiment
from internseg_ds.engine.planner import crop_size, evaluation_size
from internseg_ds.engine.scaling import plan_scaling
from internseg_ds.errors import ConfigError
from internseg_ds.planning.devices import DEVICES
from internseg_ds.planning.step_time import Assumptions, Cluster
from tests.conftest import ROOT, TINY

STEPS, BATCH = 420, 8


def plan(zero: dict, nodes: tuple[int, ...] = (1, 2), **options):
    clusters = [Cluster(DEVICES["H100"], count, 2, 50.0) for count in nodes]
    return plan_scaling(
        read_experiment(ROOT / TINY, options),
        {"bf16": {"enabled": True}, "zero_optimization": zero},
        clusters,
        Assumptions(),
    )


def test_hours_are_of_the_schedules_steps_or_of_as_many_images():
    kept, larger = plan({"stage": 3}, nodes=(1, 2)).rows
    assert (kept.global_batch, kept.keeps_batch, larger.global_batch, larger.keeps_batch) == (
        BATCH,
        True,
        2 * BATCH,
        False,
    )
    assert kept.hours == pytest.approx(STEPS * kept.time.step / 3600)
    assert larger.hours == pytest.approx(STEPS / 2 * larger.time.step / 3600)
    (free,) = plan({"stage": 3}, nodes=(2,), **{"engine.global_batch": None}).rows
    assert (free.global_batch, free.keeps_batch) == (2 * BATCH, True)
    assert free.hours == pytest.approx(STEPS * free.time.step / 3600)


def test_fewer_processes_accumulate_up_to_the_recipes_batch():
    (row,) = plan({"stage": 2}, nodes=(1,), **{"engine.global_batch": 24}).rows
    assert (row.global_batch, row.accumulation) == (24, 3)
    (odd,) = plan({"stage": 2}, nodes=(1,), **{"engine.global_batch": 27}).rows
    assert (odd.global_batch, odd.accumulation, odd.keeps_batch) == (24, 3, False)


def test_stages_trade_memory_for_communication():
    one, two, three, hpz = (
        plan({"stage": stage, **more}, nodes=(4,)).rows[0]
        for stage, more in (
            (1, {}),
            (2, {}),
            (3, {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}),
            (
                3,
                {
                    "stage3_max_reuse_distance": 0,
                    "stage3_prefetch_bucket_size": 0,
                    "zero_hpz_partition_size": 2,
                },
            ),
        )
    )
    assert one.gpu_state > two.gpu_state > hpz.gpu_state > three.gpu_state
    assert three.between_nodes > hpz.between_nodes > 0
    (offloaded,) = plan({"stage": 3, "offload_optimizer": {"device": "cpu"}}, nodes=(4,)).rows
    assert offloaded.host_state > 0 == three.host_state
    assert offloaded.gpu_state < three.gpu_state
    assert offloaded.time.host > 0


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
    experiment.val.pipeline = experiment.val.pipeline[:1]
    assert evaluation_size(experiment) == (112, 112)


def test_pure_fp32_is_refused():
    with pytest.raises(ConfigError, match="trains in fp32"):
        plan_scaling(
            read_experiment(ROOT / TINY),
            {"zero_optimization": {"stage": 3}},
            [Cluster(DEVICES["A100"], 1, 2, 50.0)],
            Assumptions(),
        )
