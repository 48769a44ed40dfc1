from dataclasses import replace
from functools import partial

import pytest
import torch

from internseg_ds.distributed.process_group import World
from internseg_ds.engine import auto_recomputation
from internseg_ds.engine.auto_recomputation import FASTEST_FIRST, as_it_will_train
from internseg_ds.engine.experiment import read_experiment
from internseg_ds.engine.forecast import forecast
from internseg_ds.engine.planner import Planner
from internseg_ds.engine.preflight import check
from internseg_ds.errors import ConfigError
from internseg_ds.planning.devices import DEVICES
from internseg_ds.planning.footprint import MARGIN
from internseg_ds.planning.step_time import Assumptions, Cluster
from tests.conftest import ROOT, TINY, data_options
from tests.distributed.ranks import spawn

DS = ROOT / "ds_configs/zero1_bf16.json"
LARGER = {
    "engine.global_batch": 8,
    "model.backbone.depth": 12,
    "model.backbone.out_indices": (2, 5, 8, 11),
    "optimizer.paramwise_cfg": {"num_layers": 12, "layer_decay_rate": 0.9},
}
"""Blocks that weigh more than the heads."""


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(read_experiment(ROOT / TINY, LARGER))


def test_auto_recomputes_no_more_than_the_memory_asks_for(planner):
    ds, _ = planner.resolve(DS, 2)
    least_recomputation = partial(auto_recomputation.least_recomputation, on_gpu=False)
    needs = {
        policy: planner.under(policy).footprint(ds, 2**40, validate=False, exact=False).peak
        for policy in FASTEST_FIRST
    }
    assert (
        needs["none"] > needs["all_but_matmuls"] > needs["blocks"]
        and needs["none"] > needs[2] > needs["blocks"]
    )
    assert least_recomputation(planner, ds, needs["none"]) == "none"
    assert least_recomputation(planner, ds, needs["none"] - 1) == "all_but_matmuls"
    assert least_recomputation(planner, ds, min(needs[2], needs["all_but_matmuls"]) - 1) == "blocks"
    assert least_recomputation(planner, ds, 0) == "blocks"


def test_some_of_a_gpu_stays_free(planner):
    ds, _ = planner.resolve(DS, 2)
    peak = planner.under("none").footprint(ds, 2**40, validate=False, exact=False).peak
    assert auto_recomputation.least_recomputation(planner, ds, peak / (1 - MARGIN) + 2) == "none"
    assert auto_recomputation.least_recomputation(planner, ds, peak / (1 - MARGIN) - 2) != "none"


def test_a_model_that_is_small_beside_the_memory_is_not_planned(planner, monkeypatch):
    monkeypatch.setattr(Planner, "footprint", lambda *_, **__: pytest.fail("it was"))
    assert auto_recomputation.least_recomputation(planner, planner.resolve(DS, 2)[0], 2**40) == "none"


def test_a_forecast_is_of_the_policy_that_auto_would_choose(planner):
    cluster = Cluster(DEVICES["H100"], 1, 2, 50.0)
    roomy, tight = (forecast(planner, DS, cluster, Assumptions(), size, None) for size in (2**40, 2**20))
    assert (roomy.planner.recomputation, tight.planner.recomputation) == ("none", "blocks")
    assert roomy.planner.passed.backbone_recomputed == 0 < tight.planner.passed.backbone_recomputed
    assert roomy.row.time.compute < tight.row.time.compute
    assert roomy.footprint.device("train") > tight.footprint.device("train")


def ranks_agree_whatever_their_own_memory(root, work_dir) -> None:
    import torch.distributed as dist

    from internseg_ds import SegmentorEngine
    from internseg_ds.engine import auto_recomputation

    auto_recomputation.free_memory = lambda *_: (
        2**40 if dist.get_rank() == 0 else 2**20
    )  # hosts with GPUs of two kinds
    options = dict(option.split("=") for option in data_options(root)) | LARGER | {"data.workers_per_gpu": 0}
    with SegmentorEngine(
        read_experiment(ROOT / TINY, options), DS, work_dir=work_dir, validate=False
    ) as engine:
        backbone = engine.deepspeed.module.backbone
        assert dist.get_world_size() == 2 and backbone.with_cp and backbone.recomputation == "blocks"


def test_ranks_agree_on_what_the_smallest_of_them_needs(ade20k, tmp_path):
    spawn(ranks_agree_whatever_their_own_memory, 2, ade20k, tmp_path / "run")


def test_a_backbone_without_our_policies_is_left_to_its_with_cp(ade20k):
    """mmseg's ResNet has a with_cp of its own."""
    options = dict(option.split("=") for option in data_options(ade20k))
    experiment = read_experiment(ROOT / TINY, options)
    experiment.model.backbone = {"type": "ResNetV1c", "depth": 18, "with_cp": True}
    experiment.model.decode_head.in_channels, experiment.model.auxiliary_head.in_channels = (
        [64, 128, 256, 512],
        256,
    )
    experiment.optimizer.pop("constructor"), experiment.optimizer.pop("paramwise_cfg")
    plan = check(experiment, DS, World(0, 2, 0), validate=False)
    planner = Planner(experiment, plan.meta_model, crop=plan.crop)
    assert auto_recomputation.agreed_recomputation(planner, plan.ds, World(), torch.float32) == "config"
    assert as_it_will_train(planner, plan.ds, 1.0) is planner
    experiment = replace(experiment, engine=replace(experiment.engine, recomputation="blocks"))
    with pytest.raises(ConfigError, match="the backbone has no activation checkpointing"):
        check(experiment, DS, World(0, 2, 0), validate=False)


def a_run_ends_for_lack_of_memory(root, work_dir) -> None:
    from internseg_ds import SegmentorEngine

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    options = dict(option.split("=") for option in data_options(root)) | LARGER | {"data.workers_per_gpu": 0}
    with (
        pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught,
        SegmentorEngine(
            read_experiment(ROOT / TINY, options), DS, work_dir=work_dir, validate=False
        ) as engine,
    ):
        engine.deepspeed.module.backbone.register_forward_pre_hook(no_room)
        engine.train()
    (note,) = caught.value.__notes__
    assert (
        "The plan had said " in note and "per process (forward and backward), with 'none' recomputed" in note
    )
    assert "engine.recomputation='all_but_matmuls' (" in note and "data.samples_per_gpu" in note


def test_a_run_that_ends_for_lack_of_memory_says_what_the_plan_had_said_and_what_needs_less(ade20k, tmp_path):
    spawn(a_run_ends_for_lack_of_memory, 1, ade20k, tmp_path / "run")
