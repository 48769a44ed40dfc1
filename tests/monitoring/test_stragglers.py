import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmseg.datasets.builder import PIPELINES
from torch import nn
from torch.utils.checkpoint import checkpoint

from internseg_ds.models.block_execution.compiled_blocks import compile_blocks
from internseg_ds.monitoring.stragglers import LayerClock, Stragglers, slowest
from internseg_ds.training.segmentor_engine import SegmentorEngine
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment

HOSTS = ["a", "a", "b", "b"]


@PIPELINES.register_module()
class SleepOnRankOne:
    """A slow disk."""

    def __call__(self, results):
        time.sleep(0.5 * dist.get_rank())
        return results


def the_log_names_the_rank_whose_data_come_late(root: Path, work_dir: Path) -> None:
    cfg = small_experiment(root, "runner.max_iters=4", after_normalize="SleepOnRankOne")
    with SegmentorEngine(
        cfg, ROOT / "ds_configs/zero3_bf16.json", work_dir=work_dir, validate=False
    ) as engine:
        engine.train()
    if dist.get_rank() == 0:
        records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        assert min(record["waits_for_slowest"] for record in records[1:]) > 20
        log = (work_dir / "train.log").read_text()
        found = r"straggler: rank 1 \(host \S+\) waits [1-9]\.\d\d s .*data.* 0\.\d\d s; .* \d+ %"
        assert re.search(found, log), log


def test_the_log_names_the_rank_whose_data_come_late(ade20k, tmp_path):
    spawn(the_log_names_the_rank_whose_data_come_late, 2, ade20k, tmp_path)


def test_the_rank_whose_data_come_late_is_named_with_what_it_costs():
    found = slowest([0.01, 0.02, 0.51, 0.01], [0.4, 0.4, 0.4, 0.42], step_s=1.0, hosts=HOSTS)
    assert (found.rank, found.cause) == (2, "data") and found.share == pytest.approx(0.5)
    assert "rank 2 (host b) waits 0.51 s a step" in found.text


def test_the_rank_that_computes_slowly_is_named_with_what_it_costs_at_most():
    found = slowest([0.01, 0.02, 0.01, 0.01], [0.4, 0.5, 0.4, 0.4], step_s=1.0, hosts=HOSTS)
    assert (found.rank, found.cause) == (1, "layers") and found.share == pytest.approx(0.2)
    assert "rank 1 (host a) computes 1.25 times as long" in found.text


def test_of_two_ranks_the_faster_one_is_what_the_slower_is_held_against():
    assert slowest([0.0, 0.3], [1.0, 1.0], step_s=1.0, hosts=["a", "a"]).share == pytest.approx(0.3)


def test_the_mend_of_waiting_for_data_is_named_once_and_after_two_records_in_a_row(caplog, monkeypatch):
    # a run before may have switched it off
    monkeypatch.setattr(logging.getLogger("internseg_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "internseg_ds")
    stragglers, lines = Stragglers(workers=3), []
    for share in (0.9, 0.0, 0.9, 0.9, 0.9):
        assert stragglers.values([(100 * share, 1.0)], 100.0) == {}  # alone, nobody is the slowest
        said = "waits for data 90 % of the time: raise data.workers_per_gpu, which is 3"
        # two handlers of other tests' may hold one
        lines.append(len({id(record) for record in caplog.records if said in record.getMessage()}))
    assert lines == [0, 0, 0, 1, 1]


class Sleeping(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


def test_batch_norms_which_wait_for_other_ranks_are_not_on_the_clock():
    assert (
        LayerClock(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), torch.device("cpu"))
        .layers[0]
        .in_features
        == 2
    )
    assert (
        len(LayerClock(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), torch.device("cpu")).layers) == 1
    )


def test_the_clock_adds_up_the_layers_and_their_recomputation_and_nothing_between():
    layers = nn.ModuleList([Sleeping(2, 2), nn.Sequential(Sleeping(2, 2), Sleeping(2, 2))])
    clock, x = LayerClock(layers, torch.device("cpu")), torch.ones(1, 2, requires_grad=True)
    with clock:
        y = layers[0](x)
        time.sleep(2)
        checkpoint(layers[1], y, use_reentrant=False).sum().backward()
    seconds = clock.seconds
    # three forwards, and the recomputation up to the last one's input, which is all that the backward needs
    assert 0.08 <= seconds < 1.5
    layers[0](x)
    assert clock.seconds == seconds  # the hooks are gone
    with clock:
        pass
    assert clock.seconds == 0


def test_a_compiled_block_is_on_the_clock_as_a_whole():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])})
    model["head"] = nn.Linear(2, 2)
    compile_blocks(model, ["blocks.0"], "eager")
    clock = LayerClock(model, torch.device("cpu"))
    assert clock.layers == [model["blocks"][0], model["head"]]
    with clock:
        model["head"](model["blocks"][0](torch.ones(1, 2)))
    assert len(clock._spans) == 2
