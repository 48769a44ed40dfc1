import json
import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmcv.cnn.utils import revert_sync_batchnorm
from mmseg.models import build_segmentor
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import ConfigError
from internseg_ds.monitoring import throughput as utilization
from internseg_ds.monitoring.step_metrics import StepMetrics
from internseg_ds.monitoring.throughput import make_meter, matmul_peak, peak_bytes
from internseg_ds.planning.flops import training_pass
from internseg_ds.training.segmentor_engine import SegmentorEngine
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment

CROP = (20, 30)


class Linears(nn.Module):
    """A segmentor of two linear layers over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.decode_head = nn.Linear(3, 40, bias=False), Head(40, 7, bias=False)

    def extract_feat(self, image):
        return [self.backbone(image.permute(0, 2, 3, 1))]


class Head(nn.Linear):
    def forward(self, features):
        return super().forward(features[0])


@pytest.fixture
def heard(caplog, monkeypatch):
    # a run before may have switched it off
    monkeypatch.setattr(logging.getLogger("internseg_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "internseg_ds")
    return caplog


def linears() -> nn.Module:
    with torch.device("meta"):
        return Linears()


def counted(model):
    return lambda: training_pass(model, *CROP)


def test_mfu_is_flops_counted_by_hand_times_images_over_seconds_and_peak():
    meter = make_meter(0.5, counted(linears()), World(), torch.float32)
    metrics = StepMetrics()
    time.sleep(0.01)
    values = meter.values(metrics, images=12)
    pixels = 20 * 30
    flops = 4 * 3 * 40 * pixels + 6 * 40 * 7 * pixels  # nobody wants the gradient of the image
    assert values["mfu"] == pytest.approx(flops * values["images_per_s"] / 0.5e12, rel=1e-12)
    assert values["hfu"] == values["mfu"]
    assert 0 < values["images_per_s"] < 12 / 0.01


def test_a_peak_that_a_training_exceeds_is_none(heard):
    meter = make_meter(1e-9, counted(linears()), World(), torch.float32)
    for _ in range(2):
        assert not {"mfu", "hfu"} & meter.values(StepMetrics(), images=12).keys()
    assert heard.text.count("so it is wrong") == 1


def test_a_model_whose_flops_cannot_be_counted_goes_without_mfu(heard):
    model = linears()
    model.decode_head.in_features = model.decode_head.weight = None
    assert set(make_meter(0.5, counted(model), World(), torch.float32).values(StepMetrics(), 1)) == {
        "images_per_s",
        "data_wait",
        "peak_gib",
    }
    assert "the model's FLOPs cannot be counted (" in heard.text


def test_no_peak_is_measured_on_a_cpu():
    assert set(make_meter(None, counted(linears()), World(), torch.float32).values(StepMetrics(), 1)) == {
        "images_per_s",
        "data_wait",
        "peak_gib",
    }


def test_the_peak_is_measured_without_a_trace_in_random_numbers_and_threads(heard, monkeypatch):
    monkeypatch.setattr(utilization, "SIDE", 256)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    peak = matmul_peak(torch.float32, World())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    said = re.search(
        r"relative to (\S+) TFLOP/s per process: products of (\d+) x \2 matrices in float32, measured; "
        r"engine.peak_tflops names another",
        heard.text,
    )
    assert float(said[1]) == pytest.approx(peak / 1e12, rel=1e-3) and 1e8 < peak < 1e14


@pytest.mark.parametrize("peak", [0, -1.0, True, "989", float("nan"), float("inf")])
def test_a_peak_that_is_no_number_of_tflops_is_refused(peak):
    with pytest.raises(ConfigError, match=r"engine.peak_tflops=.* TFLOP/s per device"):
        EngineOptions(peak_tflops=peak)


def test_peak_memory_on_a_cpu_is_what_the_kernel_saw():
    torch.ones(2**20)
    status = Path("/proc/self/status").read_text()
    assert peak_bytes(torch.device("cpu")) == pytest.approx(
        1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]), abs=2**23
    )


def test_waiting_for_data_is_a_share_of_the_time_that_is_not_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(
        "internseg_ds.monitoring.step_metrics.time", SimpleNamespace(perf_counter=lambda: now[0])
    )
    metrics = StepMetrics()
    with metrics.waiting():
        now[0] += 1
    now[0] += 2
    with metrics.paused():
        now[0] += 50
    now[0] += 1
    values = make_meter(0.5, counted(linears()), World(), torch.float32).values(metrics, images=8)
    assert (values["data_wait"], values["images_per_s"]) == (0.25, 2.0)


def records_of_two_ranks_that_accumulate(
    root: Path, work_dir: Path, model_flops: float, hardware_flops: float
) -> None:
    cfg = small_experiment(
        root,
        "runner.max_iters=4",
        "engine.global_batch=8",
        "engine.peak_tflops=0.25",
        "log_config.interval=2",
        "engine.recomputation=blocks",
    )
    with SegmentorEngine(
        cfg, ROOT / "ds_configs/zero3_bf16.json", work_dir=work_dir, validate=False
    ) as engine:
        engine.train()
    if dist.get_rank() == 0:
        first, second = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        assert second["images_per_s"] == pytest.approx(16 / (second["time"] - first["time"]), rel=0.2)
        for record in (first, second):
            assert record["mfu"] == pytest.approx(
                100 * model_flops * record["images_per_s"] / (2 * 0.25e12), rel=1e-6
            )
            assert record["hfu"] / record["mfu"] == pytest.approx(hardware_flops / model_flops, rel=1e-6)
            assert record["peak_gib"] > 0.1
        assert re.search(
            r"  images_per_s \S+  mfu \d+\.\d %  peak_gib \S+ ",
            (work_dir / "train.log").read_text(),
        )


def test_records_of_two_ranks_that_accumulate_hold_the_flops_that_a_real_training_step_has(ade20k, tmp_path):
    counts = []
    for recompute in (False, True):  # on real tensors, with losses
        cfg = read_experiment(small_experiment(ade20k), {"model.backbone.with_cp": recompute}).model
        model = revert_sync_batchnorm(build_segmentor(cfg)).train()
        inputs = {
            "img": torch.randn(2, 3, 112, 112),
            "img_metas": [{}, {}],
            "gt_semantic_seg": torch.zeros(2, 1, 112, 112, dtype=torch.long),
        }
        # torch counts nothing for the CPU's kernel of attention
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sum(
                value for name, value in model(return_loss=True, **inputs).items() if "loss" in name
            ).backward()
        counts.append(counter.get_total_flops() / 2)
    assert counts[0] < counts[1]
    spawn(records_of_two_ranks_that_accumulate, 2, ade20k, tmp_path, *counts)
