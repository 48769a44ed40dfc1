from dataclasses import replace

import pytest
import torch

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import ConfigError
from internseg_ds.planning.auto_checkpointing import (
    FASTEST_FIRST,
    agreed_checkpointing,
    as_it_will_train,
    least_checkpointing,
)
from internseg_ds.planning.devices import DEVICES, Cluster
from internseg_ds.planning.estimate import estimate
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import Platform
from internseg_ds.planning.step_time import Assumptions
from internseg_ds.preflight.preflight import check
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
def estimator() -> Estimator:
    return Estimator(read_experiment(ROOT / TINY, LARGER))


def on_host(size: float) -> Platform:
    return Platform(size, on_gpu=False)


def test_auto_recomputes_no_more_than_the_memory_asks_for(estimator):
    ds, _ = estimator.resolve(DS, 2)
    needs = {
        policy: estimator.under(policy).training_memory(ds, on_host(2**40)).peak for policy in FASTEST_FIRST
    }
    assert (
        needs["none"] > needs["all_but_matmuls"] > needs["blocks"]
        and needs["none"] > needs[2] > needs["blocks"]
    )
    least = min(needs[2], needs["all_but_matmuls"])
    for size, policy in (
        (needs["none"], "none"),
        (needs["none"] - 1, "all_but_matmuls"),
        (least - 1, "blocks"),
        (0, "blocks"),
    ):
        assert least_checkpointing(estimator, ds, on_host(size)) == policy


def test_some_of_a_gpu_stays_free(estimator):
    ds, _ = estimator.resolve(DS, 2)
    peak = estimator.under("none").training_memory(ds, on_host(2**40)).peak
    assert least_checkpointing(estimator, ds, Platform(peak / 0.94 + 2)) == "none"
    assert least_checkpointing(estimator, ds, Platform(peak / 0.94 - 2)) != "none"


def test_a_model_that_is_small_beside_the_memory_is_not_looked_at(estimator, monkeypatch):
    monkeypatch.setattr(Estimator, "training_memory", lambda *_, **__: pytest.fail("it was"))
    assert least_checkpointing(estimator, estimator.resolve(DS, 2)[0], Platform(2**40)) == "none"


def test_an_estimate_is_of_the_policy_that_auto_would_choose(estimator):
    roomy, tight = (
        estimate(estimator, DS, Cluster(replace(DEVICES["H100"], memory_gib=gib), 1, 2, 50.0), Assumptions())
        for gib in (1024, 1 / 1024)
    )
    assert (roomy.checkpointing, tight.checkpointing) == ("none", "blocks")
    assert roomy.image.backbone_recomputed == 0 < tight.image.backbone_recomputed
    assert roomy.step.time.compute < tight.step.time.compute
    assert roomy.memory.device("train") > tight.memory.device("train")


def ranks_agree_whatever_their_own_memory(root, work_dir) -> None:
    import torch.distributed as dist

    from internseg_ds import SegmentorEngine
    from internseg_ds.planning import auto_checkpointing

    # hosts with GPUs of two kinds
    auto_checkpointing.free_memory = lambda *_: 2**40 if dist.get_rank() == 0 else 2**20
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
    estimator = Estimator(experiment, plan.meta_model, crop=plan.crop)
    assert agreed_checkpointing(estimator, plan.ds, World(), torch.float32) == "config"
    assert as_it_will_train(estimator, plan.ds, Platform(1.0)) is estimator
    experiment = replace(experiment, engine=replace(experiment.engine, recomputation="blocks"))
    with pytest.raises(ConfigError, match="no activation checkpointing"):
        check(experiment, DS, World(0, 2, 0), validate=False)


def a_run_ends_for_lack_of_memory(root, work_dir) -> None:
    from internseg_ds import SegmentorEngine

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    options = dict(option.split("=") for option in data_options(root)) | LARGER | {"data.workers_per_gpu": 0}
    with (
        pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught,
        SegmentorEngine(
            read_experiment(ROOT / TINY, options), DS, work_dir=work_dir, validate=False
        ) as engine,
    ):
        engine.deepspeed.module.backbone.register_forward_pre_hook(no_room)
        engine.train()
    (note,) = caught.value.__notes__
    assert "The estimate had been " in note and "with 'none' recomputed" in note
    assert "engine.recomputation='all_but_matmuls' (" in note and "data.samples_per_gpu" in note


def test_a_run_that_ends_for_lack_of_memory_reports_its_estimate_and_what_needs_less(ade20k, tmp_path):
    spawn(a_run_ends_for_lack_of_memory, 1, ade20k, tmp_path / "run")
