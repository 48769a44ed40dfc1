import pytest

from internseg_ds.distributed.process_group import World
from internseg_ds.engine.auto_recomputation import FASTEST_FIRST, least_recomputation
from internseg_ds.engine.experiment import read_experiment
from internseg_ds.engine.forecast import forecast
from internseg_ds.engine.planner import Planner
from internseg_ds.engine.preflight import check
from internseg_ds.errors import ConfigError
from internseg_ds.planning.devices import DEVICES
from internseg_ds.planning.step_time import Assumptions, Cluster
from tests.conftest import ROOT, TINY, data_options
from tests.distributed.ranks import spawn

DS = ROOT / "ds_configs/zero1_bf16.json"
LARGER = {"engine.global_batch": 8, "engine.recomputation": "auto", "model.backbone.depth": 12, "model.backbone.out_indices": (2, 5, 8, 11),
          "optimizer.paramwise_cfg": {"num_layers": 12, "layer_decay_rate": 0.9}}
"""Blocks that weigh more than the heads."""


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(read_experiment(ROOT / TINY, LARGER))


def test_auto_recomputes_no_more_than_the_memory_asks_for(planner):
    ds, _ = planner.resolve(DS, 2)
    needs = {policy: planner.under(policy).footprint(ds, 2**40, validate=False, exact=False).peak for policy in FASTEST_FIRST}
    assert needs["none"] > needs["all_but_matmuls"] > needs["blocks"] and needs["none"] > needs[2] > needs["blocks"]
    assert least_recomputation(planner, ds, needs["none"]) == "none"
    assert least_recomputation(planner, ds, needs["none"] - 1) == "all_but_matmuls"
    assert least_recomputation(planner, ds, min(needs[2], needs["all_but_matmuls"]) - 1) == "blocks"
    assert least_recomputation(planner, ds, 0) == "blocks"


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

    auto_recomputation.free_memory = lambda *_: 2**40 if dist.get_rank() == 0 else 2**20  # hosts with GPUs of two kinds
    options = dict(option.split("=") for option in data_options(root)) | LARGER | {"data.workers_per_gpu": 0}
    with SegmentorEngine(read_experiment(ROOT / TINY, options), DS, work_dir=work_dir, validate=False) as engine:
        backbone = engine.deepspeed.module.backbone
        assert dist.get_world_size() == 2 and backbone.with_cp and backbone.recomputation == "blocks"


def test_ranks_agree_on_what_the_smallest_of_them_needs(ade20k, tmp_path):
    spawn(ranks_agree_whatever_their_own_memory, 2, ade20k, tmp_path / "run")


def test_auto_is_refused_where_there_is_nothing_to_choose(ade20k):
    options = dict(option.split("=") for option in data_options(ade20k))
    experiment = read_experiment(ROOT / TINY, options | {"engine.recomputation": "auto"})
    check(experiment, DS, World(0, 2, 0), validate=False)
    experiment.model.backbone = {"type": "UNet"}
    experiment.optimizer.pop("constructor"), experiment.optimizer.pop("paramwise_cfg")
    with pytest.raises(ConfigError, match="the backbone has no activation checkpointing"):
        check(experiment, DS, World(0, 2, 0), validate=False)
